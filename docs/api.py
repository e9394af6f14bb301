"""API entries in MyST Markdown, read from source: signature, docstring, and the comment beside each parameter (its docment)."""
import ast, io, re, tokenize

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def public(source: str) -> list[ast.stmt]:
    "Functions and classes that a source defines for others."
    return [node for node in ast.parse(source).body if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_")]


def entries(
    source: str,  # of a module or a cell
    module: str,  # creawrite.data
    index: bool,  # whether links and the search lead here
) -> str:
    "Entries for everything public in a source."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    beside = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    options = [f":module: {module}"] + [":no-index:"] * (not index)
    entry = lambda node: class_entry(node, beside, options) if isinstance(node, ast.ClassDef) else function_entry(node, beside, options, "function")
    return "\n\n".join(map(entry, public(source)))


def directive(kind: str, signature: str, options: list[str], doc: str, described: dict[str, str], inner: str = "") -> str:
    "One MyST directive; `inner` holds those of a class's methods."
    fields = [f":{'returns' if name == 'return' else f'param {name}'}: {plain(text)}" for name, text in described.items() if text]
    fence = "`" * (4 if inner else 3)
    return "\n".join([f"{fence}{{py:{kind}}} {signature}", *options, "", plain(doc), "", *fields, "", inner, fence])


def plain(text: str) -> str:
    "Outside code, `<run>` is a placeholder and no HTML."
    return "".join(part if i % 2 else part.replace("<", r"\<") for i, part in enumerate(re.split(r"(`+[^`]+`+)", text)))


def function_entry(node: ast.stmt, beside: dict[int, str], options: list[str], kind: str) -> str:
    "A function or method."
    marks = [name.id for name in node.decorator_list if isinstance(name, ast.Name)]
    if "property" in marks:
        return directive("property", node.name, options + ([f":type: {ast.unparse(node.returns)}"] if node.returns else []), doc_of(node), {})
    more = [":async:"] * isinstance(node, ast.AsyncFunctionDef) + [f":{mark}:" for mark in marks if mark in ("classmethod", "staticmethod")]
    bound = kind == "method" and "staticmethod" not in marks
    return directive(kind, f"{node.name}{signature(node, bound)}", options + more, doc_of(node), docments(node, beside))


def class_entry(node: ast.ClassDef, beside: dict[int, str], options: list[str]) -> str:
    "A class: how to make one, then its public methods."
    made = next((item for item in node.body if isinstance(item, FUNCTIONS) and item.name == "__init__"), None)
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    arguments, described = (signature(made, True), docments(made, beside)) if made else field_list(fields, beside)
    methods = [item for item in node.body if isinstance(item, FUNCTIONS) and (not item.name.startswith("_") or item.name == "__call__")]
    inner = "\n\n".join(function_entry(item, beside, [option for option in options if option == ":no-index:"], "method") for item in methods)
    return directive("class", f"{node.name}{arguments}", options, doc_of(node), described, inner)


def doc_of(node: ast.stmt) -> str: return ast.get_docstring(node) or ""


def signature(node: ast.stmt, bound: bool) -> str:
    "Parameters and return type, without self or cls for what is bound."
    arguments = node.args
    if bound: arguments = ast.arguments(**{**vars(arguments), "args": arguments.args[1:]})
    return f"({ast.unparse(arguments)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def docments(node: ast.stmt, beside: dict[int, str]) -> dict[str, str]:
    "Comment beside each parameter that has a line of its own, and beside the line that closes the signature."
    arguments = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
    found = {each.arg: beside.get(each.lineno, "") for each in arguments if each and each.lineno > node.lineno}
    closing = node.body[0].lineno - 1
    return found if closing in [each.lineno for each in arguments if each] else found | {"return": beside.get(closing, "")}


def field_list(fields: list[ast.AnnAssign], beside: dict[int, str]) -> tuple[str, dict[str, str]]:
    "Fields of a dataclass or a pydantic model as the arguments that make one, with their descriptions."
    shown, described = [], {}
    for item in fields:
        call = item.value if isinstance(item.value, ast.Call) else None
        told = [word.value.value for word in (call.keywords if call else []) if word.arg == "description" and isinstance(word.value, ast.Constant)]
        described[item.target.id] = beside.get(item.lineno) or "".join(told)
        default = f" = {ast.unparse(item.value)}" if item.value and not call else ""
        shown.append(f"{item.target.id}: {ast.unparse(item.annotation)}{default}")
    return (f"({', '.join(shown)})" if shown else ""), described
