"use strict";

const at = (id) => document.getElementById(id);
const headers = () => ({
  "Content-Type": "application/json",
  ...(at("key").value ? { Authorization: "Bearer " + at("key").value } : {}),
});
let model = null;
let running = null;

async function refusal(response) {
  try { return (await response.json()).error.message; }
  catch { return "the server answered " + response.status; }
}

async function findModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await refusal(response));
  model = (await response.json()).data[0].id;
  at("model").textContent = document.title = model;
}

function asked() {
  const body = { model, stream: true, stream_options: { include_usage: true }, max_tokens: Number(at("tokens").value) };
  if (at("mode").value) body.mode = at("mode").value;
  if (at("temperature").value !== "") body.temperature = Number(at("temperature").value);
  if (at("kind").value === "text") return ["v1/completions", { ...body, prompt: at("prompt").value }];
  return ["v1/chat/completions", { ...body, messages: [{ role: "user", content: at("prompt").value }] }];
}

function take(line) {
  if (!line.startsWith("data: ") || line === "data: [DONE]") return;
  const said = JSON.parse(line.slice(6));
  if (said.error) throw new Error(said.error.message);
  for (const choice of said.choices) {
    at("answer").textContent += choice.delta ? choice.delta.content || "" : choice.text;
  }
  if (said.usage) {
    const { prompt_tokens, completion_tokens, drafted_tokens, accepted_tokens } = said.usage;
    at("usage").textContent =
      `${prompt_tokens} tokens of the prompt, ${completion_tokens} of the answer; ` +
      `${accepted_tokens} of ${drafted_tokens} drafted tokens accepted`;
  }
}

async function send() {
  at("answer").textContent = at("usage").textContent = "";
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  try {
    if (model === null) await findModel();
    const [path, body] = asked();
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal });
    if (!response.ok) throw new Error(await refusal(response));
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (held + value).split("\n");
      held = lines.pop();
      lines.forEach(take);
    }
  } catch (error) {
    if (error.name !== "AbortError") at("usage").textContent = "Error: " + error.message;
  } finally {
    at("send").disabled = false;
    at("stop").disabled = true;
  }
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("stop").addEventListener("click", () => running.abort());
findModel().catch((error) => { at("usage").textContent = "Error: " + error.message; });
