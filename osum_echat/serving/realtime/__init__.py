"""The real-time dialogue over WebSocket: OpenAI Realtime (GA names) and GPT-Live on one session machine.

`session.RealtimeSession` is the machine, without a socket; `turns` says when somebody speaks and when a turn ends;
`conversation` holds the items; `audio` converts what goes over the wire; `pace` keeps the sound close to what has been
played; `socket` is FastAPI around it.
"""
