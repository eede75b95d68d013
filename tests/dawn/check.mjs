// Holds WGSL against Dawn's compiler, Tint, the one of Chromium: every file of a folder becomes a module and a
// pipeline within WebGPU's default limits. On Dawn's null backend, which validates and runs nothing, so no
// driver is needed; another is named behind the folder ("vulkan" also makes SPIR-V and compiles it).
//
//   node check.mjs FOLDER [BACKEND]

import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { create } from "webgpu";

const [folder, backend = "null"] = process.argv.slice(2);

const gpu = create([`backend=${backend}`]); // kept: Dawn ends the process when it is collected
const adapter = await gpu.requestAdapter();
if (!adapter) throw new Error(`Dawn has no adapter on its ${backend} backend`);
const device = await adapter.requestDevice({ requiredFeatures: ["shader-f16", "subgroups"] });

/** What Dawn has against a kernel; nothing where it has nothing. */
async function objections(code) {
  device.pushErrorScope("validation");
  const module = device.createShaderModule({ code });
  const failed = device.popErrorScope();
  const { messages } = await module.getCompilationInfo();
  const said = messages.map((m) => `${m.lineNum}:${m.linePos}: ${m.type}: ${m.message}`);
  const error = await failed;
  if (error && said.length === 0) said.push(error.message);
  if (said.length > 0) return said.join("\n");
  try {
    await device.createComputePipelineAsync({ layout: "auto", compute: { module, entryPoint: "main" } });
    return "";
  } catch (e) {
    return e.message;
  }
}

/** A checker that accepts everything would prove nothing: these must be refused, and naga lets most of them pass. */
async function refuses() {
  const kernel = (before, body, memory = 64) => `${before}
@group(0) @binding(0) var<storage, read_write> y: array<f32>;
var<workgroup> wg: array<f32, ${memory}>;
@compute @workgroup_size(64) fn main(@builtin(local_invocation_index) i: u32) { wg[i] = 1.0; ${body} y[i] = wg[0]; }`;
  const good = kernel("enable subgroups;", "workgroupBarrier(); wg[i] = subgroupAdd(y[i]);");
  const said = await objections(good);
  if (said) throw new Error(`a good kernel is refused: ${said}`);
  for (const [bad, word] of [
    [kernel("", "if (i < 32u) { workgroupBarrier(); }"), "uniform control flow"],
    [kernel("", "wg[i] = subgroupAdd(y[i]);"), "subgroups"],
    [kernel("enable subgroups;", "if (i < 7u) { wg[i] = subgroupAdd(y[i]); }"), "uniform control flow"],
    [kernel("", "wg[i] = f32(1.0h);"), "f16"],
    [kernel("", "wg[i] = -3.4028235e38f * 2f;"), "f32"],
    [kernel("", "", 4097), "workgroup storage"],
    [kernel("", "z = 1;"), "z"],
  ]) {
    const said = await objections(bad);
    if (!said.includes(word)) throw new Error(`not refused for "${word}" but "${said}":\n${bad}`);
  }
}

await refuses();
const wanted = Number(readFileSync(join(folder, "count"), "utf8"));
const files = readdirSync(folder).filter((name) => name.endsWith(".wgsl")).sort();
let passed = 0;
for (const name of files) {
  const said = await objections(readFileSync(join(folder, name), "utf8"));
  if (said) console.error(`${name}: ${said}`);
  else passed += 1;
}
const info = adapter.info;
console.log(`Dawn (${[info.vendor, info.description, info.device].filter(Boolean).join(", ")}): ${passed} of ${wanted} texts passed`);
if (!(wanted > 0) || files.length !== wanted) {
  console.error(`${files.length} texts in ${folder}, ${wanted} were announced`);
  process.exit(1);
}
process.exit(passed === wanted ? 0 : 1);
