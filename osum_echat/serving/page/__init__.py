"""The web page for files and conversations (gradio): `app.serve` starts it, `osum-echat page` is its command."""
