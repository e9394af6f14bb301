"""API entries in MyST Markdown, read from source: signature, docstring, and the comment beside each parameter."""
import ast, io, re, tokenize

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)


def public(source: str) -> list[ast.stmt]:
    "Functions and classes that a source defines for others."
    nodes = ast.parse(source).body
    return [node for node in nodes if isinstance(node, DEFINITIONS) and not node.name.startswith("_")]


def entries(
    source: str,  # of a module or a cell
    module: str,  # creawrite.data
    index: bool,  # whether links and the search lead here
) -> str:
    "Entries for everything public in a source."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    beside = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    options = [f":module: {module}"] + [":no-index:"] * (not index)
    return "\n\n".join(entry(node, beside, options) for node in public(source))


def entry(node: ast.stmt, beside: dict[int, str], options: list[str]) -> str:
    "A class or a function."
    if isinstance(node, ast.ClassDef): return class_entry(node, beside, options)
    return function_entry(node, beside, options, "function")


def directive(
    kind: str,  # function, class, method, property
    signature: str,
    options: list[str],
    doc: str,
    described: dict[str, str],  # parameter, or return -> docment
    inner: str = "",  # directives of a class's methods
) -> str:
    "One MyST directive."
    fields = [f":{'returns' if name == 'return' else f'param {name}'}: {plain(text)}"
              for name, text in described.items() if text]
    fence = "`" * (4 if inner else 3)
    head = [f"{fence}{{py:{kind}}} {signature}", *options, ""]
    return "\n".join([*head, plain(doc), "", *fields, "", inner, fence])


def plain(text: str) -> str:
    "Outside code, `<run>` is a placeholder and no HTML."
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(part if i % 2 else part.replace("<", r"\<") for i, part in enumerate(parts))


def function_entry(node: ast.stmt, beside: dict[int, str], options: list[str], kind: str) -> str:
    "A function or method."
    marks = [name.id for name in node.decorator_list if isinstance(name, ast.Name)]
    if "property" in marks:
        kind_of_value = [f":type: {ast.unparse(node.returns)}"] if node.returns else []
        return directive("property", node.name, options + kind_of_value, doc_of(node), {})
    more = [":async:"] * isinstance(node, ast.AsyncFunctionDef)
    more += [f":{mark}:" for mark in marks if mark in ("classmethod", "staticmethod")]
    heading = node.name + signature(node, bound=kind == "method" and "staticmethod" not in marks)
    return directive(kind, heading, options + more, doc_of(node), docments(node, beside))


def class_entry(node: ast.ClassDef, beside: dict[int, str], options: list[str]) -> str:
    "A class: how to make one, then its public methods."
    functions = [item for item in node.body if isinstance(item, FUNCTIONS)]
    maker = next((item for item in functions if item.name == "__init__"), None)
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    arguments, described = field_list(fields, beside)
    if maker: arguments, described = signature(maker, bound=True), docments(maker, beside)
    inherited = [option for option in options if option == ":no-index:"]
    inner = [function_entry(item, beside, inherited, "method") for item in functions
             if item.name == "__call__" or not item.name.startswith("_")]
    return directive("class", node.name + arguments, options, doc_of(node), described, "\n\n".join(inner))


def doc_of(node: ast.stmt) -> str: return ast.get_docstring(node) or ""


def signature(node: ast.stmt, bound: bool) -> str:
    "Parameters and return type, without self or cls for what is bound."
    arguments = node.args
    if bound: arguments = ast.arguments(**{**vars(arguments), "args": arguments.args[1:]})
    return f"({ast.unparse(arguments)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def docments(node: ast.stmt, beside: dict[int, str]) -> dict[str, str]:
    "Comment beside each parameter that has a line of its own, and beside the line that closes the signature."
    arguments = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
    comments = {each.arg: beside.get(each.lineno, "") for each in arguments if each and each.lineno > node.lineno}
    closing = node.body[0].lineno - 1
    if closing in [each.lineno for each in arguments if each]: return comments
    return comments | {"return": beside.get(closing, "")}


def field_list(fields: list[ast.AnnAssign], beside: dict[int, str]) -> tuple[str, dict[str, str]]:
    "Fields of a dataclass or a pydantic model as the arguments that make one, with their descriptions."
    arguments, described = [], {}
    for item in fields:
        call = item.value if isinstance(item.value, ast.Call) else None
        described[item.target.id] = beside.get(item.lineno) or (description(call) if call else "")
        default = f" = {ast.unparse(item.value)}" if item.value and not call else ""
        arguments.append(f"{item.target.id}: {ast.unparse(item.annotation)}{default}")
    return (f"({', '.join(arguments)})" if arguments else ""), described


def description(call: ast.Call) -> str:
    "What a pydantic Field is described as."
    words = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
    return words.get("description", "")
