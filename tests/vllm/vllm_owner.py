"""Starts mini with vLLM from the exported folder, answers once, says which processes belong to it, and waits to be killed."""

from __future__ import annotations

import sys
import time

import psutil

if __name__ == "__main__":
    from osum_echat.pipeline import EChat

    echat = EChat.load("mini", device="cpu", llm_engine="vllm", vllm_folder=sys.argv[1])
    assert echat.chat(text="hello", greedy=True).text
    print("processes", *[process.pid for process in psutil.Process().children(recursive=True)], flush=True)
    time.sleep(600)
