// `openai` (npm), OpenAIRealtimeWS. It speaks TLS only: give it a server with a certificate, and NODE_EXTRA_CA_CERTS.
import OpenAI from "openai";
import { OpenAIRealtimeWS } from "openai/realtime/ws";
import { Microphone, RATE, newReport, threeTurns, url } from "./dialogue.mjs";

const report = newReport("openai-npm");
const client = new OpenAI({ apiKey: "sk-test", baseURL: url.replace("wss://", "https://").replace(/\/realtime$/, "") });
const rt = new OpenAIRealtimeWS({ model: "gpt-realtime" }, client);
rt.on("response.created", () => report.begins());
rt.on("response.output_audio.delta", (event) => report.sounds(Buffer.from(event.delta, "base64").length / 2 / RATE));
rt.on("input_audio_buffer.speech_started", () => report.over());
rt.on("response.output_audio_transcript.done", (event) => report.answers.push(event.transcript));
rt.on("conversation.item.input_audio_transcription.completed", (event) => report.transcripts.push(event.transcript));
rt.on("response.done", ({ response }) => { if (response.status === "completed") report.ended(); });
rt.on("error", (error) => report.errors.push(error.message));
rt.socket.on("open", async () => {
  rt.send({ type: "session.update", session: { type: "realtime", output_modalities: ["audio"] } });
  await threeTurns(new Microphone((data) => rt.send({ type: "input_audio_buffer.append", audio: data.toString("base64") })), report);
  rt.close();
  process.exit(0);
});
