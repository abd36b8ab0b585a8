"""A live conversation with any Realtime server, played at the speed of life and measured: Full-Duplex-Bench's form.

For each ``ID/input.wav`` (what the person says, with pauses) the system's side is recorded as ``ID/output.wav``,
time-synchronous with the input and as a listener would hear it, and all events as ``ID/events.jsonl``. `measures` makes
delays, interruptions and rejections of them.
"""
