// The same with openapi-fetch: no generated code, only the types that openapi-typescript has written into schema.d.ts
// (`npm run types`, then `npm run build`). Paths, bodies and answers are checked by the compiler.
//
//   node dist/fetch.js PICTURES.zip BASE_MODEL [STEPS] [RESOLUTION] [OUTPUT]
import { readFile, writeFile } from "node:fs/promises";
import { basename } from "node:path";

import createClient from "openapi-fetch";

import { tensorsOf } from "./safetensors.js";
import type { components, paths } from "./schema.js";

const [pictures, baseModel, steps = "1000", resolution = "512", output = "lumo.safetensors"] = process.argv.slice(2);
if (!pictures || !baseModel) {
  throw new Error("usage: fetch.js PICTURES.zip BASE_MODEL [STEPS] [RESOLUTION] [OUTPUT]");
}

const key = process.env.LORASMITH_API_KEY;
const client = createClient<paths>({
  baseUrl: process.env.LORASMITH ?? "http://127.0.0.1:7870",
  headers: key ? { authorization: `Bearer ${key}` } : {},
});

/** The data of an answer; a refusal is thrown as the problem that it is. */
function expect<T>(answer: { data?: T; error?: unknown }): T {
  if (answer.data === undefined) throw new Error(JSON.stringify(answer.error, null, 2));
  return answer.data;
}

const dataset = expect(await client.POST("/v1/datasets", { body: { name: "lumo" } }));

const file = new File([new Uint8Array(await readFile(pictures))], basename(pictures));
const upload = expect(
  await client.POST("/v1/datasets/{dataset_id}/images", {
    params: { path: { dataset_id: dataset.id } },
    body: { file: [] },
    bodySerializer: () => {
      const form = new FormData();
      form.append("file", file);
      return form;
    },
  }),
);
console.log(`dataset ${dataset.id}: ${upload.summary.images} pictures`);

const pages = await client.GET("/v1/datasets/{dataset_id}/images", {
  params: { path: { dataset_id: dataset.id }, query: { limit: 1 } },
});
const first = expect(pages).data[0];
if (!first) throw new Error("no pictures");
const path = { dataset_id: dataset.id, image_id: first.id };
const seen = await client.GET("/v1/datasets/{dataset_id}/images/{image_id}", { params: { path } });
const changed = expect(
  await client.PATCH("/v1/datasets/{dataset_id}/images/{image_id}", {
    params: { path, header: { "If-Match": seen.response.headers.get("etag") ?? undefined } },
    headers: { "content-type": "application/merge-patch+json" },
    body: { caption: `${first.caption ?? "lumo"}, smiling` },
  }),
);
console.log(`caption of ${changed.file_name}: ${changed.caption}`);

const body: components["schemas"]["CreateRun"] = {
  name: "lumo",
  dataset_id: dataset.id,
  base_model: baseModel,
  network: { rank: 16, alpha: 16 },
  max_train_steps: Number(steps),
  resolution: { width_px: Number(resolution), height_px: Number(resolution) },
  buckets: { min_px: Number(resolution) / 2, max_px: Number(resolution) * 2 },
  seed: 42,
};
const plan = expect(await client.POST("/v1/runs:plan", { body }));
console.log(`plan: ${plan.total_steps} steps on ${plan.device}`);
if (plan.refusal) throw new Error(plan.refusal.message);

let run = expect(await client.POST("/v1/runs", { body }));
const stream = await client.GET("/v1/runs/{run_id}/events", {
  params: { path: { run_id: run.id } },
  headers: { accept: "text/event-stream" },
  parseAs: "stream",
});
if (stream.data) await follow(stream.data);

run = expect(await client.GET("/v1/runs/{run_id}", { params: { path: { run_id: run.id } } }));
if (run.state !== "succeeded" || !run.lora_id) throw new Error(`${run.state}: ${run.error?.message}`);
const content = await client.GET("/v1/loras/{lora_id}/content", {
  params: { path: { lora_id: run.lora_id } },
  parseAs: "arrayBuffer",
});
const bytes = new Uint8Array(expect(content));
console.log(`${output}: ${tensorsOf(bytes).length} tensors`);
await writeFile(output, bytes);

/** Prints server-sent events until the stream ends, which is when the run does. */
async function follow(stream: ReadableStream<Uint8Array>): Promise<void> {
  const decoder = new TextDecoder();
  let text = "";
  for await (const part of stream) {
    text += decoder.decode(part, { stream: true });
    const blocks = text.split("\n\n");
    text = blocks.pop() ?? "";
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("event:") || line.startsWith("data:"));
      if (lines.length > 0) console.log(`  ${lines.join("  ")}`);
    }
  }
}
