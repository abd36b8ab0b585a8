// What the JavaScript clients share: see dialogue.py.
import { readFileSync } from "node:fs";

export const RATE = 24000;
export const [, , url, wav] = process.argv;
export const speech = readFileSync(wav).subarray(44);
export const sleep = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));

export function newReport(client) {
  return {
    client, turns: 0, interrupted: 0, completed: 0, audio_seconds: 0, transcripts: [], answers: [], errors: [],
    answering: false, seconds: 0, plays_until: 0,
    begins() { this.turns++; this.answering = true; this.seconds = 0; },
    sounds(seconds) {
      this.seconds += seconds;
      this.audio_seconds += seconds;
      this.plays_until = Math.max(this.plays_until, performance.now()) + 1000 * seconds;
    },
    ended() { if (this.answering) { this.answering = false; this.completed++; } },
    over() {
      if (!this.seconds || !(this.answering || performance.now() < this.plays_until)) return;
      this.interrupted++;
      if (!this.answering) this.completed--;
      this.answering = false;
      this.plays_until = 0;
    },
  };
}

export class Microphone {
  constructor(send) { this.send = send; this.left = Buffer.alloc(0); }
  say() { this.left = speech; }
  start() {
    const begun = performance.now();
    let number = 0;
    this.timer = setInterval(() => {
      while (number * 40 <= performance.now() - begun) {
        const piece = Buffer.alloc(1920);
        this.left.copy(piece, 0, 0, Math.min(1920, this.left.length));
        this.left = this.left.subarray(1920);
        this.send(piece);
        number++;
      }
    }, 20);
  }
  stop() { clearInterval(this.timer); }
}

async function until(test, what, seconds = 40) {
  const end = performance.now() + seconds * 1000;
  while (!test()) {
    if (performance.now() > end) throw new Error(`${what} did not come within ${seconds} s`);
    await sleep(0.02);
  }
}

export async function threeTurns(microphone, report) {
  microphone.start();
  await sleep(0.5);
  microphone.say();
  await until(() => report.completed >= 1, "the first answer");
  await sleep(2.5);
  microphone.say();
  await until(() => report.turns >= 2 && report.seconds > 0.2, "the second answer");
  microphone.say();
  await until(() => report.interrupted >= 1, "the interruption");
  await until(() => report.completed >= 2, "the third answer");
  await sleep(0.5);
  microphone.stop();
  console.log(JSON.stringify(report));
}
