// Runs before gradio starts: the visitor's language, and a player for sound that is still being made.
(() => {
  const KEY = "osum-echat-language";
  const chosen = localStorage.getItem(KEY);
  if (chosen) {
    // Gradio's own labels follow the browser's language; so they follow the visitor's choice too.
    Object.defineProperty(navigator, "language", { get: () => chosen, configurable: true });
    Object.defineProperty(navigator, "languages", { get: () => [chosen], configurable: true });
  }
  document.documentElement.lang = navigator.language || "en";
  window.osumLanguage = () => navigator.language || "en";
  window.osumChooseLanguage = (code) => {
    localStorage.setItem(KEY, code === "zh" ? "zh-CN" : "en");
    location.reload();
  };

  // Without a microphone the upload is offered first.
  window.osumPickSource = async () => {
    const devices = navigator.mediaDevices ? await navigator.mediaDevices.enumerateDevices() : [];
    if (devices.some((device) => device.kind === "audioinput")) return;
    const upload = document.querySelector("#osum-wav .source-selection button, #osum-wav button[aria-label*='pload']");
    if (upload) upload.click();
  };

  let context = null;
  let playing = [];
  let fetching = null;
  // Browsers allow sound only after a gesture: the first click or key opens the player.
  const open = () => {
    context = context || new AudioContext();
    if (context.state === "suspended") context.resume();
  };
  addEventListener("pointerdown", open, { passive: true });
  addEventListener("keydown", open, { passive: true });

  window.osumStop = () => {
    if (fetching) fetching.abort();
    for (const source of playing) try { source.stop(); } catch (error) { /* it had not begun */ }
    playing = [];
    fetching = null;
  };

  window.osumPlay = async (name) => {
    if (!name) return;
    window.osumStop();
    open();
    window.osumSounds = (window.osumSounds || []).concat([{ name, asked: performance.now(), samples: 0 }]);
    const log = window.osumSounds[window.osumSounds.length - 1];
    const abort = (fetching = new AbortController());
    let at = 0;
    let rest = new Uint8Array(0);
    try {
      const response = await fetch("osum/sound/" + encodeURIComponent(name), { signal: abort.signal });
      if (!response.ok) return;
      const rate = Number(response.headers.get("X-Sample-Rate")) || 22050;
      const reader = response.body.getReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        const bytes = new Uint8Array(rest.length + value.length);
        bytes.set(rest);
        bytes.set(value, rest.length);
        const count = bytes.length >> 1;
        rest = bytes.slice(2 * count);
        if (!count) continue;
        const view = new DataView(bytes.buffer);
        const buffer = context.createBuffer(1, count, rate);
        const channel = buffer.getChannelData(0);
        for (let i = 0; i < count; i++) channel[i] = view.getInt16(2 * i, true) / 32768;
        const source = context.createBufferSource();
        source.buffer = buffer;
        source.connect(context.destination);
        at = Math.max(at, context.currentTime + 0.05);
        source.start(at);
        at += buffer.duration;
        playing.push(source);
        if (!log.samples) log.first = performance.now();
        log.samples += count;
      }
      log.done = performance.now();
    } catch (error) {
      if (error.name !== "AbortError") console.warn("sound:", error.message);
    }
  };
})();
