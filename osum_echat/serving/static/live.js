// The page: a client of /v1/realtime like any other, that asks for the server's own events (thoughts, tags, suspected speech) as well.
import { Audio, RATE, fromBase64, toBase64 } from "/static/audio.js";
import { WORDS } from "/static/words.js";

const $ = (id) => document.getElementById(id);
const store = { get: (k) => { try { return localStorage.getItem(k); } catch { return null; } }, set: (k, v) => { try { localStorage.setItem(k, v); } catch { /* private window */ } } };
let language = store.get("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
const say = (name, ...args) => { const word = WORDS[language][name]; return typeof word === "function" ? word(...args) : word; };

const page = { socket: null, audio: null, active: null, item: null, left: 0, stopped: null, key: "", captions: {}, played: {}, latencies: [], sending: false, state: "off" };

// ---- words and state -----------------------------------------------------------------------------------------------------------------

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = say(element.dataset.say);
  for (const element of document.querySelectorAll("[data-say-label]")) element.setAttribute("aria-label", say(element.dataset.sayLabel));
  if (page.socket) $("connect").textContent = say("stop");
  show(page.state);
  drawLatency();
}

function show(state) { page.state = state; $("state").textContent = say(state); document.body.dataset.state = state; }

function notice(text) { $("notice").textContent = text || ""; $("notice").hidden = !text; }

function resting() { show(!page.socket ? "off" : page.left ? "speaking" : page.active ? "thinking" : "listening"); }

// ---- connection ----------------------------------------------------------------------------------------------------------------------

async function start() {
  notice("");
  show("connecting");
  $("connect").disabled = true;
  try {
    const protocols = await credentials();
    page.audio = new Audio(onMicrophone, onPlayed);
    page.audio.onLost = () => { stop(); notice(say("lost")); };
    await page.audio.start($("microphone").value);
    await listDevices();
    await open(protocols);
    $("connect").textContent = say("stop");
    resting();
  } catch (error) {
    await stop();
    notice(reason(error));
  } finally {
    $("connect").disabled = false;
  }
}

function reason(error) {
  const known = { NotAllowedError: "denied", NotFoundError: "noMicrophone", OverconstrainedError: "noMicrophone", NotReadableError: "busyMicrophone", SecurityError: "insecure" };
  return known[error.name] ? say(known[error.name]) : error.message;
}

async function credentials() {
  // A browser cannot set headers of a WebSocket: the key is changed for a short-lived secret, which goes into the subprotocol.
  for (;;) {
    const headers = page.key ? { Authorization: `Bearer ${page.key}` } : {};
    let reply;
    try { reply = await fetch("/v1/realtime/client_secrets", { method: "POST", headers }); } catch { throw new Error(say("noServer")); }
    if (reply.ok) return ["realtime", `openai-insecure-api-key.${(await reply.json()).value}`];
    if (reply.status !== 401) throw new Error(say("server") + ((await reply.json().catch(() => ({}))).error?.message || reply.status));
    if (page.key) notice(say("wrongKey"));
    page.key = await askKey();
  }
}

function askKey() {
  return new Promise((resolve, reject) => {
    const dialog = $("ask");
    $("key").value = "";
    dialog.onclose = () => dialog.returnValue === "ok" && $("key").value ? (notice(""), resolve($("key").value)) : reject(new Error(say("wrongKey")));
    dialog.returnValue = "";
    dialog.showModal();
  });
}

function open(protocols) {
  return new Promise((resolve, reject) => {
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/realtime`, protocols);
    let said = "";
    socket.onmessage = ({ data }) => {
      const event = JSON.parse(data);
      if (event.type === "session.created") { page.socket = socket; send({ type: "session.update", session: settings() }); resolve(); }
      if (event.type === "error") said = event.error.message;
      on[event.type]?.(event);
    };
    socket.onerror = () => reject(new Error(say("noServer")));
    socket.onclose = () => {
      const lost = page.socket === socket;
      reject(new Error(said ? say("server") + said : say("gone")));
      if (lost) { stop(); notice(said ? say("server") + said : say("gone")); }
    };
  });
}

async function stop() {
  const { socket, audio } = page;
  Object.assign(page, { socket: null, audio: null, active: null, item: null, left: 0, sending: false });
  socket?.close();
  await audio?.stop();
  $("connect").textContent = say("start");
  $("interrupt").disabled = true;
  resting();
}

function send(event) { if (page.socket?.readyState === WebSocket.OPEN) page.socket.send(JSON.stringify(event)); }

function settings() {
  const mode = $("turns").value;
  const detection = mode === "none" ? null : { type: mode, create_response: true, interrupt_response: true };
  return { type: "realtime", audio: { input: { turn_detection: detection } }, x_echat: { events: true, think: $("think").value || null } };
}

// ---- sound ---------------------------------------------------------------------------------------------------------------------------

function onMicrophone(samples, peak) {
  drawLevel(peak);
  if ($("turns").value !== "none" || page.sending) send({ type: "input_audio_buffer.append", audio: toBase64(samples) });
}

function onPlayed(played, left) {
  Object.assign(page.played, played);
  const before = page.left;
  page.left = left;
  if (before !== left && (!before || !left)) { $("interrupt").disabled = !page.active && !left; if (page.state !== "hearing") resting(); }
}

function silence() {
  // What is left of the answer is not played, and the server is told how much was.
  if (page.item && (page.left || page.active)) {
    const milliseconds = Math.round((page.played[page.item] || 0) / RATE * 1000);
    send({ type: "conversation.item.truncate", item_id: page.item, content_index: 0, audio_end_ms: milliseconds });
    markCut(page.item);
  }
  page.audio?.clear();
  page.left = 0;
  page.item = null;
}

function interrupt() {
  if (page.active) send({ type: "response.cancel" });
  silence();
  $("interrupt").disabled = true;
}

function hold(on) {
  if (!page.socket || page.sending === on || $("turns").value !== "none") return;
  $("talk").classList.toggle("held", on);
  $("talk").setAttribute("aria-pressed", String(on));
  if (on) {
    interrupt();
    send({ type: "input_audio_buffer.clear" });
    page.sending = true;
    show("hearing");
  } else {
    page.sending = false;
    page.stopped = performance.now();
    send({ type: "input_audio_buffer.commit" });
    send({ type: "response.create" });
    show("thinking");
  }
}

// ---- events of the server --------------------------------------------------------------------------------------------------------------

const on = {
  "x_echat.speech_suspected": () => { if (page.left) page.audio.duck(true); },
  "x_echat.speech_dismissed": () => page.audio.duck(false),
  "input_audio_buffer.speech_started": () => { silence(); page.audio?.duck(false); show("hearing"); },
  "input_audio_buffer.speech_stopped": () => { page.stopped = performance.now(); show("thinking"); },
  "conversation.item.added": ({ item }) => { if (item.role === "user") caption(item.id, "user", ""); },
  "conversation.item.input_audio_transcription.completed": ({ item_id, transcript }) => caption(item_id, "user", transcript || say("unclear")),
  "response.created": ({ response }) => { page.active = response.id; $("interrupt").disabled = false; },
  "x_echat.thought.done": ({ thought, tags }) => { page.thought = thought; showTags(tags); },
  "response.output_item.added": ({ item }) => { page.item = item.id; page.played[item.id] = 0; caption(item.id, "reply", "", page.thought); page.thought = null; },
  "response.output_audio_transcript.delta": ({ item_id, delta }) => append(item_id, delta),
  "response.output_text.delta": ({ item_id, delta }) => append(item_id, delta),
  "response.output_audio.delta": ({ item_id, delta }) => {
    if (page.stopped) { latency((performance.now() - page.stopped) / 1000); page.stopped = null; }
    if (item_id === page.item) { page.audio?.play(fromBase64(delta), item_id); page.left ||= 1; show("speaking"); }
  },
  "response.done": ({ response }) => {
    page.active = null;
    $("interrupt").disabled = !page.left;
    if (response.status === "failed") notice(say("server") + response.status_details.error.message);
    if (response.status === "cancelled" && response.output[0]) markCut(response.output[0].id);
    if (page.state !== "hearing") resting();
  },
  "conversation.item.input_audio_transcription.failed": ({ item_id, error }) => { caption(item_id, "user", say("unclear")); notice(say("server") + error.message); },
  "x_echat.warning": ({ message }) => console.info(message),
  error: ({ error }) => { if (!["response_cancel_not_active", "item_truncate_invalid_item_id"].includes(error.code)) notice(say("server") + error.message); },
};

// ---- what is shown -------------------------------------------------------------------------------------------------------------------

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function caption(id, kind, text, thought) {
  $("empty").hidden = true;
  let entry = page.captions[id];
  if (!entry) {
    const line = element("li", "", { class: kind });
    line.append(element("span", say(kind === "user" ? "you" : "reply"), { class: "who" }));
    const words = element("span", "", { class: "text" });
    if (thought) {
      const folded = element("details", "");
      folded.append(element("summary", say("thought")), element("p", thought));
      line.append(folded);
    }
    line.append(words);
    entry = page.captions[id] = { line, words };
    $("captions").append(line);
  }
  if (text) entry.words.textContent = text;
  $("captions").scrollTop = $("captions").scrollHeight;
}

function append(id, delta) {
  const entry = page.captions[id];
  if (entry) { entry.words.textContent += delta; $("captions").scrollTop = $("captions").scrollHeight; }
}

function markCut(id) {
  const entry = page.captions[id];
  if (entry && !entry.cut) { entry.cut = true; entry.line.append(element("span", ` ${say("cut")}`, { class: "cut" })); }
}

function chips(tags) {
  return ["emotion", "gender", "age", "event"].filter((name) => tags[name]).map((name) => {
    const chip = element("li", say("tag", say(name)));
    chip.append(element("b", say("values")[tags[name].replace(/[<>]/g, "").toLowerCase()] ?? tags[name]));
    return chip;
  });
}

function showTags(tags) {
  $("tags").replaceChildren(...chips(tags));
  const line = element("li", "");
  const list = element("ul", "", { class: "chips" });
  list.append(...chips(tags));
  line.append(element("span", new Date().toLocaleTimeString(document.documentElement.lang), { class: "small" }), list);
  $("history").prepend(line);
  while ($("history").children.length > 50) $("history").lastChild.remove();
}

function latency(seconds) {
  page.latencies.push(seconds);
  if (page.latencies.length > 24) page.latencies.shift();
  drawLatency();
}

function drawLatency() {
  const values = page.latencies, chart = $("chart"), most = Math.max(1, ...values);
  const shape = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  chart.replaceChildren(
    shape("line", { x1: 0, x2: 240, y1: 71, y2: 71 }),
    ...values.map((v, i) => shape("rect", { x: i * 10 + 1, width: 8, y: 70 - v / most * 66, height: v / most * 66 })),
  );
  const sorted = [...values].sort((a, b) => a - b), format = (v) => v.toFixed(2);
  $("latency-text").textContent = values.length ? say("chart", values.length, format(sorted[sorted.length >> 1]), format(values.at(-1))) : say("noTurns");
}

function drawLevel(peak) {
  const canvas = $("level"), brush = canvas.getContext("2d");
  brush.clearRect(0, 0, canvas.width, canvas.height);
  brush.fillStyle = getComputedStyle(document.body).getPropertyValue("--accent");
  brush.fillRect(0, 0, Math.min(1, Math.sqrt(peak)) * canvas.width, canvas.height);
}

async function listDevices() {
  const { microphones, speakers } = await Audio.devices();
  const fill = (select, devices) => {
    const chosen = select.value;
    select.replaceChildren(new Option(say("first"), ""), ...devices.filter((d) => d.deviceId && d.deviceId !== "default").map((d, i) => new Option(d.label || `${i + 1}`, d.deviceId)));
    select.value = [...select.options].some((o) => o.value === chosen) ? chosen : "";
  };
  fill($("microphone"), microphones);
  fill($("speaker"), speakers);
  $("speaker-field").hidden = !("setSinkId" in AudioContext.prototype);
}

// ---- what the person does ------------------------------------------------------------------------------------------------------------

$("connect").onclick = () => (page.socket ? stop() : start());
$("interrupt").onclick = interrupt;
$("language").value = language;
$("language").onchange = () => { language = $("language").value; store.set("language", language); translate(); };
$("microphone").onchange = () => page.audio?.useMicrophone($("microphone").value).catch((error) => notice(reason(error)));
$("speaker").onchange = () => page.audio?.useSpeaker($("speaker").value).catch((error) => notice(reason(error)));
$("turns").onchange = () => { $("talk").hidden = $("turns").value !== "none"; send({ type: "session.update", session: settings() }); };
$("think").onchange = () => send({ type: "session.update", session: settings() });
$("talk").onpointerdown = (event) => { $("talk").setPointerCapture(event.pointerId); hold(true); };
$("talk").onpointerup = $("talk").onpointercancel = () => hold(false);
const typing = (event) => ["INPUT", "SELECT", "TEXTAREA", "SUMMARY"].includes(event.target.tagName) || (event.target.tagName === "BUTTON" && event.target.id !== "talk");
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("ask").open && (page.active || page.left)) interrupt();
  if (event.code === "Space" && !event.repeat && !typing(event) && page.socket && $("turns").value === "none") { event.preventDefault(); hold(true); }
});
addEventListener("keyup", (event) => { if (event.code === "Space" && page.sending) { event.preventDefault(); hold(false); } });
addEventListener("blur", () => hold(false));
navigator.mediaDevices?.addEventListener?.("devicechange", listDevices);
translate();
listDevices();
