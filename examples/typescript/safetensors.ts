/** The names of the tensors in a safetensors file that holds a LoRA. */
export function tensorsOf(file: Uint8Array): string[] {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const length = Number(view.getBigUint64(0, true));
  const header: Record<string, unknown> = JSON.parse(new TextDecoder().decode(file.subarray(8, 8 + length)));
  const names = Object.keys(header).filter((name) => name !== "__metadata__");
  if (!names.some((name) => name.endsWith("lora_down.weight"))) throw new Error("no LoRA");
  return names;
}
