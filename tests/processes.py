"Processes of their own for trainings: begun in a moment, killed for good, or side by side as accelerate starts them."
import gc
import os
import signal
import socket
from multiprocessing import get_context

SERVER = get_context("forkserver")  # it imports once; every process begins with everything imported
SERVER.set_forkserver_preload(["pytest", "creawrite.sft", "creawrite.reward_model", "creawrite.grpo"])


def start(work, *arguments, environment=None, told=None):
    "A process that does `work(*arguments)`, a function at the top of a module; what it prints goes into a file."
    process = SERVER.Process(target=_begin, args=(os.environ | (environment or {}), told, work, arguments))
    process.start()
    return process


def _begin(environment, told, work, arguments):
    import torch
    gc.freeze()  # a trainer collects garbage: not among all that was imported
    os.environ.update(environment)
    torch.set_num_threads(1)
    if told:
        file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2): os.dup2(file, stream)
    work(*arguments)


def ended(*processes) -> list[int]:
    "Exit codes; -9 is kill -9."
    for process in processes: process.join(timeout=300)
    for process in processes:
        if process.is_alive(): process.kill()
    return [process.exitcode for process in processes]


def die(*args, **kwargs):
    "What kill -9 does, in any function's place."
    os.kill(os.getpid(), signal.SIGKILL)


def side_by_side(work, *arguments, processes=2, told=None) -> list[int]:
    "The same in several processes with gloo, each in the environment that `accelerate launch --cpu` gives it."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    ranks = [common | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
    return ended(*(start(work, *arguments, environment=rank, told=told) for rank in ranks))
