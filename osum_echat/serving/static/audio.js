// Microphone and loudspeaker, around worklet.js. Samples are 16-bit PCM at 24 kHz, in base64 on the wire.
export const RATE = 24000;

export function toBase64(samples) {
  const bytes = new Uint8Array(samples.length * 2);
  const view = new DataView(bytes.buffer);
  samples.forEach((x, i) => view.setInt16(i * 2, Math.max(-1, Math.min(1, x)) * 32767, true));
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

export function fromBase64(text) {
  const binary = atob(text);
  const view = new DataView(Uint8Array.from(binary, (c) => c.charCodeAt(0)).buffer);
  return Float32Array.from({ length: binary.length >> 1 }, (_, i) => view.getInt16(i * 2, true) / 32768);
}

export class Audio {
  // onSamples(samples, peak): from the microphone. onPlayed(samples played by answer, pieces left).
  constructor(onSamples, onPlayed) {
    this.onSamples = onSamples;
    this.onPlayed = onPlayed;
  }

  async start(deviceId) {
    if (!navigator.mediaDevices) throw new DOMException("", "SecurityError"); // not localhost and not HTTPS
    this.stream = await navigator.mediaDevices.getUserMedia(this.wanted(deviceId));
    this.context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
    await this.context.audioWorklet.addModule("/static/worklet.js");
    await this.context.resume();
    this.player = new AudioWorkletNode(this.context, "player", { numberOfInputs: 0, outputChannelCount: [1] });
    this.player.port.onmessage = ({ data }) => this.onPlayed(data.played, data.left);
    this.player.connect(this.context.destination);
    this.capture = new AudioWorkletNode(this.context, "capture", { numberOfOutputs: 0, channelCount: 1 });
    this.capture.port.onmessage = ({ data }) => this.onSamples(data.samples, data.peak);
    this.listen();
  }

  wanted(deviceId) {
    const audio = { echoCancellation: true, noiseSuppression: true, autoGainControl: true, channelCount: 1 };
    return { audio: deviceId ? { ...audio, deviceId: { exact: deviceId } } : audio };
  }

  listen() {
    this.source?.disconnect();
    this.source = this.context.createMediaStreamSource(this.stream);
    this.source.connect(this.capture);
    this.stream.getAudioTracks()[0].onended = () => this.onLost?.();
  }

  async useMicrophone(deviceId) {
    const stream = await navigator.mediaDevices.getUserMedia(this.wanted(deviceId));
    this.stream.getTracks().forEach((track) => track.stop());
    this.stream = stream;
    this.listen();
  }

  async useSpeaker(deviceId) {
    await this.context.setSinkId?.(deviceId);
  }

  play(samples, item) { this.player?.port.postMessage({ samples, item }, [samples.buffer]); }
  clear() { this.player?.port.postMessage({ clear: true, gain: 1 }); }
  duck(on) { this.player?.port.postMessage({ gain: on ? 0.2 : 1 }); }

  async stop() {
    this.stream?.getTracks().forEach((track) => track.stop());
    await this.context?.close();
    this.context = this.player = this.capture = null;
  }

  static async devices() {
    const all = await navigator.mediaDevices?.enumerateDevices() || [];
    return { microphones: all.filter((d) => d.kind === "audioinput"), speakers: all.filter((d) => d.kind === "audiooutput") };
  }
}
