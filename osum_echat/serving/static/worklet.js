// The two ends of the sound: what the microphone hears goes out in pieces of 24 kHz samples, and what the server says is played from a queue.
// Runs on the audio thread; talks to audio.js by messages.
const RATE = 24000;

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.step = sampleRate / RATE;
    this.position = 0;
    this.last = 0;
    this.piece = new Float32Array(RATE / 25); // 40 ms
    this.filled = 0;
  }

  process(inputs) {
    const channel = inputs[0][0];
    if (!channel) return true;
    let peak = 0;
    if (this.step === 1) {
      for (const x of channel) { this.put(x); peak = Math.max(peak, Math.abs(x)); }
    } else { // between two samples, on a straight line
      while (this.position < channel.length) {
        const below = Math.floor(this.position), part = this.position - below;
        const before = below === 0 ? this.last : channel[below - 1];
        const x = before + (channel[below] - before) * part;
        this.put(x);
        peak = Math.max(peak, Math.abs(x));
        this.position += this.step;
      }
      this.position -= channel.length;
      this.last = channel[channel.length - 1];
    }
    this.peak = Math.max(this.peak || 0, peak);
    return true;
  }

  put(x) {
    this.piece[this.filled++] = x;
    if (this.filled === this.piece.length) {
      this.port.postMessage({ samples: this.piece, peak: this.peak || 0 });
      this.piece = new Float32Array(this.piece.length);
      this.filled = 0;
      this.peak = 0;
    }
  }
}

class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = [];
    this.at = 0; // in the first piece, in samples of 24 kHz
    this.gain = 1;
    this.wanted = 1;
    this.told = 0;
    this.played = {}; // samples of each answer that were played
    this.step = RATE / sampleRate;
    this.port.onmessage = ({ data }) => {
      if (data.samples) this.queue.push(data);
      if (data.clear) { this.queue = []; this.at = 0; this.tell(); }
      if (data.gain !== undefined) this.wanted = data.gain;
    };
  }

  tell() {
    this.port.postMessage({ played: this.played, left: this.queue.length });
    const current = this.queue[0];
    this.played = current ? { [current.item]: this.played[current.item] || 0 } : {};
    this.told = currentTime;
  }

  process(_, outputs) {
    const out = outputs[0][0];
    const had = this.queue.length > 0;
    for (let i = 0; i < out.length; i++) {
      this.gain += (this.wanted - this.gain) * 0.002; // no click
      const piece = this.queue[0];
      if (!piece) { out[i] = 0; continue; }
      const below = Math.floor(this.at), part = this.at - below;
      const samples = piece.samples;
      const a = samples[below], b = below + 1 < samples.length ? samples[below + 1] : a;
      out[i] = (a + (b - a) * part) * this.gain;
      this.at += this.step;
      if (this.at >= samples.length) {
        this.at -= samples.length;
        this.played[piece.item] = (this.played[piece.item] || 0) + samples.length;
        this.queue.shift();
        if (!this.queue.length) this.at = 0;
      }
    }
    for (let c = 1; c < outputs[0].length; c++) outputs[0][c].set(out);
    if ((had && !this.queue.length) || currentTime - this.told > 0.1) this.tell();
    return true;
  }
}

registerProcessor("capture", Capture);
registerProcessor("player", Player);
