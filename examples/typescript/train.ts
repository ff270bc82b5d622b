// From pictures to a LoRA with a client that openapi-generator has written (`npm run generate`, then `npm run build`).
//
//   node dist/train.js PICTURES.zip BASE_MODEL [STEPS] [RESOLUTION] [OUTPUT]
//
// PICTURES.zip is in kohya layout. The address comes from LORASMITH, the key from LORASMITH_API_KEY where the service wants
// one.
import { readFile, writeFile } from "node:fs/promises";
import { basename } from "node:path";

import {
  Configuration,
  type CreateRun,
  DatasetsApi,
  ImagesApi,
  LorasApi,
  ResponseError,
  RunState,
  RunsApi,
} from "./client/index.js";
import { tensorsOf } from "./safetensors.js";

const [pictures, baseModel, steps = "1000", resolution = "512", output = "lumo.safetensors"] = process.argv.slice(2);
if (!pictures || !baseModel) {
  throw new Error("usage: train.js PICTURES.zip BASE_MODEL [STEPS] [RESOLUTION] [OUTPUT]");
}

const configuration = new Configuration({
  basePath: process.env.LORASMITH ?? "http://127.0.0.1:7870",
  accessToken: process.env.LORASMITH_API_KEY ?? "",
});
const datasets = new DatasetsApi(configuration);
const images = new ImagesApi(configuration);
const runs = new RunsApi(configuration);
const loras = new LorasApi(configuration);

try {
  const datasetId = await upload(pictures);
  await correctACaption(datasetId);
  const runId = await start(datasetId, baseModel);
  await follow(runId);
  await download(runId);
} catch (error) {
  // Every refusal is a problem: a stable code, and each wrong field with what was found and expected.
  if (!(error instanceof ResponseError)) throw error;
  console.error(await error.response.json());
  process.exitCode = 1;
}

async function upload(path: string): Promise<string> {
  const dataset = await datasets.createDataset({ createDataset: { name: "lumo" } });
  const file = new File([new Uint8Array(await readFile(path))], basename(path));
  const { summary, files } = await images.uploadImages({ datasetId: dataset.id, file: [file] });
  console.log(`dataset ${dataset.id}: ${summary.images} pictures, ${summary.captions} captions`);
  for (const refused of files.filter((file) => file.problem)) {
    console.log(`  ${refused.name}: ${refused.problem?.message}`);
  }
  return dataset.id;
}

async function correctACaption(datasetId: string): Promise<void> {
  const [first] = (await images.listImages({ datasetId, limit: 1 })).data;
  if (!first) throw new Error("no pictures");
  const ids = { datasetId, imageId: first.id };
  const ifMatch = (await images.getImageRaw(ids)).raw.headers.get("etag") ?? undefined;
  const imagePatch = { caption: `${first.caption ?? "lumo"}, smiling` };
  // With If-Match nobody's change in between is overwritten: it would be a 412.
  const changed = await images.updateImage({ ...ids, ifMatch, imagePatch });
  console.log(`caption of ${changed.fileName}: ${changed.caption}`);
}

async function start(datasetId: string, baseModel: string): Promise<string> {
  const size = Number(resolution);
  const createRun: CreateRun = {
    name: "lumo",
    datasetId,
    baseModel,
    network: { rank: 16, alpha: 16 },
    unetLr: 1e-4,
    textEncoderLr: 5e-5,
    scheduler: { id: "cosine" },
    maxTrainSteps: Number(steps),
    resolution: { widthPx: size, heightPx: size },
    buckets: { minPx: size / 2, maxPx: size * 2 },
    seed: 42,
  };
  const plan = await runs.planRun({ createRun });
  console.log(`plan: ${plan.totalSteps} steps over ${plan.images} pictures on ${plan.device}`);
  if (plan.refusal) throw new Error(plan.refusal.message);
  // The key makes it safe to send this again when no answer comes.
  const run = await runs.createRun({ createRun, idempotencyKey: `lumo-${datasetId}` });
  return run.id;
}

/** Prints events until the run's story ends; each answer comes when there is something to tell. */
async function follow(runId: string): Promise<void> {
  let after: number | null | undefined = 0;
  while (after != null) {
    const events = await runs.listEvents({ runId, after, wait: 30 });
    if (!events) return;
    for (const { event, data } of events.data) {
      if (event === "state") console.log(`  ${data.state}`);
      if (event === "progress") console.log(`  step ${data.step}, loss ${data.loss_average.toFixed(4)}`);
    }
    after = events.nextAfter;
  }
}

async function download(runId: string): Promise<void> {
  const run = await runs.getRun({ runId });
  if (run.state !== RunState.Succeeded || !run.loraId) throw new Error(`${run.state}: ${run.error?.message}`);
  const file = await loras.getLoraContent({ loraId: run.loraId });
  const bytes = new Uint8Array(await file.arrayBuffer());
  const tensors = tensorsOf(bytes);
  await writeFile(output, bytes);
  console.log(`${output}: ${tensors.length} tensors`);
}
