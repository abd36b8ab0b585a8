// `@openai/agents-realtime` in node, over WebSocket.
import { OpenAIRealtimeWebSocket, RealtimeAgent, RealtimeSession } from "@openai/agents-realtime";
import { Microphone, RATE, newReport, threeTurns, url } from "./dialogue.mjs";

const report = newReport("agents-realtime-npm");
const agent = new RealtimeAgent({ name: "Friend", instructions: "Be kind." });
const transport = new OpenAIRealtimeWebSocket({ url: `${url}?model=gpt-realtime` });
const session = new RealtimeSession(agent, { transport, model: "gpt-realtime" });
session.on("error", (error) => report.errors.push(JSON.stringify(error)));
session.on("audio", ({ data }) => report.sounds(data.byteLength / 2 / RATE));
session.on("audio_interrupted", () => report.over());
session.on("history_updated", (history) => {
  const said = (role) => history.filter((i) => i.type === "message" && i.role === role).flatMap((i) => i.content.map((c) => c.transcript)).filter(Boolean);
  report.transcripts = said("user");
  report.answers = said("assistant");
});
transport.on("*", (event) => {
  if (event.type === "response.created") report.begins();
  if (event.type === "response.done" && event.response.status === "completed") report.ended();
});
await session.connect({ apiKey: "sk-test", url: `${url}?model=gpt-realtime` });
await threeTurns(new Microphone((data) => session.sendAudio(data.buffer.slice(data.byteOffset, data.byteOffset + data.length))), report);
session.close();
process.exit(0);
