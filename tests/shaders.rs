//! Every variant of every kernel through naga's parser and validator, without a device; and the limits
//! that every device grants. A last test holds the list of variants against what plans really ask for.

use std::collections::{BTreeMap, HashSet};
use std::sync::OnceLock;

use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, StorageAccess, TypeInner};
use qkv::attention::{Align, Options, Problem, Route, Tensors, View, plan};
use qkv::gpu::{DType, Gpu, Shader, Tensor, templates};

const FLOATS: [&str; 2] = ["f32", "f16"];
const BOTH: [bool; 2] = [false, true];
const VECTORS: [u32; 2] = [1, 4];

/// D and Dv of the decode kernels, whose rows are unrolled by them.
const DIMS: [[u32; 2]; 9] = [
    [1, 1],
    [12, 20],
    [32, 32],
    [33, 7],
    [64, 64],
    [128, 128],
    [192, 128],
    [256, 256],
    [576, 512],
];

/// What the attention kernels have in common: types, vectors and masks.
fn masks(kernel: &'static str) -> Vec<Shader> {
    let mut all = Vec::new();
    for [q, kv, out] in FLOATS.iter().flat_map(|q| {
        let pairs = FLOATS.iter().flat_map(|kv| FLOATS.map(|out| [*kv, out]));
        pairs.map(|[kv, out]| [*q, kv, out])
    }) {
        for vec in VECTORS {
            for (causal, top_left) in [(false, false), (true, false), (true, true)] {
                for has_kv_len in BOTH {
                    for has_rows in BOTH {
                        all.push(
                            Shader::new(kernel)
                                .with("F16", [q, kv, out].contains(&"f16"))
                                .with("VEC", vec)
                                .with("Q_TYPE", q)
                                .with("KV_TYPE", kv)
                                .with("O_TYPE", out)
                                .with("HAS_KV_LEN", has_kv_len)
                                .with("HAS_ROWS", has_rows)
                                .with("CAUSAL", causal)
                                .with("TOP_LEFT", top_left),
                        );
                    }
                }
            }
        }
    }
    all
}

/// The constants of `decode` for a head dim, as the plan makes them.
fn decode_sizes(shader: Shader, [d, dv]: [u32; 2], rows: u32, split: bool) -> Shader {
    let v_quads = dv.div_ceil(4);
    let chunks = v_quads.div_ceil(64);
    let columns = v_quads.div_ceil(chunks);
    shader
        .with("ROWS", rows)
        .with("QUADS", d.div_ceil(4))
        .with("COLUMNS", columns)
        .with("SLICES", 64 / columns)
        .with("CHUNKS", chunks)
        .with("SPLIT", split)
}

/// Attention's variants. Every type and mask where they meet the code; the sizes of `decode` in full
/// for one mask.
fn attention_variants() -> Vec<Shader> {
    let mut all = Vec::new();
    for kernel in ["scores", "softmax", "values", "merge"] {
        all.extend(masks(kernel));
    }
    for shader in masks("prefill") {
        for chunks in 1..=4u32 {
            let rows = if chunks == 1 { 4u32 } else { 2 };
            all.push(shader.clone().with("V_CHUNKS", chunks).with("ROWS", rows));
        }
    }
    for (ix, shader) in masks("decode").into_iter().enumerate() {
        let (dims, every) = match ix {
            // f32 in single elements, without a mask: every size.
            0 => (&DIMS[..], true),
            _ => (&DIMS[1..2], false),
        };
        for &dim in dims {
            for rows in [1, 2, 4, 8] {
                if (every || [1, 8].contains(&rows)) && (rows < 8 || dim[0] <= 256) {
                    for split in BOTH {
                        all.push(decode_sizes(shader.clone(), dim, rows, split));
                    }
                }
            }
        }
    }
    all
}

/// The variants of everything around attention.
fn other_variants() -> Vec<Shader> {
    let mut all = Vec::new();
    for (kernel, rows) in [("matvec", &[1, 2, 4][..]), ("matmul", &[4, 8])] {
        for &rows in rows {
            for vec in VECTORS {
                for has_bias in BOTH {
                    for has_residual in BOTH {
                        for activation in ["none", "relu", "gelu", "gelu_tanh", "silu"] {
                            for [x, w, y] in [
                                ["f32"; 3],
                                ["f16"; 3],
                                ["f16", "f16", "f32"],
                                ["f32", "f16", "f32"],
                            ] {
                                all.push(
                                    Shader::new(kernel)
                                        .with("F16", [x, w, y].contains(&"f16"))
                                        .with("T", x)
                                        .with("W_TYPE", w)
                                        .with("O_TYPE", y)
                                        .with("VEC", vec)
                                        .with("ROWS", rows)
                                        .with("HAS_BIAS", has_bias)
                                        .with("HAS_RESIDUAL", has_residual)
                                        .with("ACTIVATION", activation),
                                );
                            }
                        }
                    }
                }
            }
        }
    }
    for t in FLOATS {
        for kernel in ["norm", "append"] {
            all.push(Shader::new(kernel).with("F16", t == "f16").with("T", t));
        }
        for w in FLOATS {
            for has_lengths in BOTH {
                all.push(
                    Shader::new("embed")
                        .with("F16", [t, w].contains(&"f16"))
                        .with("T", t)
                        .with("W_TYPE", w)
                        .with("HAS_LENGTHS", has_lengths),
                );
            }
        }
    }
    for candidates in [1u32, 2, 8, 64] {
        for renormalize in [false, true] {
            let shader = Shader::new("choose").with("CANDIDATES", candidates);
            all.push(shader.with("RENORMALIZE", renormalize));
        }
    }
    for beams in [2u32, 4, 32] {
        all.push(Shader::new("reorder").with("BEAMS", beams));
    }
    all
}

/// Bytes of each kernel's parameters on the host's side.
fn params_bytes(kernel: &str) -> u32 {
    match kernel {
        "scores" | "softmax" | "values" | "prefill" | "decode" | "merge" => 8 * 4 + 4 * 16 + 16,
        "embed" | "append" => 32,
        "matmul" | "matvec" | "norm" | "choose" | "reorder" => 16,
        other => panic!("{other} is not in the list"),
    }
}

/// Parses, validates and measures one kernel; the error says what is wrong.
fn check(kernel: &str, text: &str) -> Result<(), String> {
    // Capabilities that extensions stand for; only f16 is used.
    let capabilities = Capabilities::SHADER_FLOAT16;
    let mut options = naga::front::wgsl::Options::new();
    options.capabilities = capabilities;
    let module = naga::front::wgsl::Frontend::new_with_options(options)
        .parse(text)
        .map_err(|e| e.emit_to_string(text))?;
    Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .map_err(|e| e.emit_to_string(text))?;

    let [entry] = module.entry_points.as_slice() else {
        return Err(format!("{} entry points", module.entry_points.len()));
    };
    let threads: u32 = entry.workgroup_size.iter().product();
    if entry.name != "main" || threads > 256 {
        return Err(format!("{} with {threads} threads", entry.name));
    }
    let (mut workgroup, mut storage, mut written, mut bindings) = (0, 0, 0, Vec::new());
    for (_, variable) in module.global_variables.iter() {
        let inner = &module.types[variable.ty].inner;
        match variable.space {
            AddressSpace::WorkGroup => workgroup += inner.size(module.to_ctx()),
            AddressSpace::Storage { access } => {
                storage += 1;
                written += u32::from(access.contains(StorageAccess::STORE));
            }
            AddressSpace::Uniform => {
                let (is, wanted) = (inner.size(module.to_ctx()), params_bytes(kernel));
                if is != wanted || !matches!(inner, TypeInner::Struct { .. }) {
                    return Err(format!("parameters of {is} bytes for {wanted}"));
                }
            }
            space => return Err(format!("a variable in {space:?}")),
        }
        if let Some(binding) = &variable.binding {
            assert_eq!(binding.group, 0);
            bindings.push(binding.binding);
        }
    }
    // Where no more is offered: WebGPU's least limits.
    if workgroup > 16_384 || storage > 8 {
        return Err(format!(
            "{workgroup} bytes of workgroup memory, {storage} storage buffers"
        ));
    }
    if written == 0 {
        return Err("nothing is written".into());
    }
    if bindings != (0..=storage).collect::<Vec<u32>>() {
        return Err(format!("bindings {bindings:?}"));
    }
    Ok(())
}

#[test]
fn every_variant_of_every_kernel_is_valid() {
    let templates = templates();
    let mut counts = BTreeMap::new();
    // Constants that a text does not use make variants of equal text: each text is checked once.
    let mut texts = HashSet::new();
    for shader in attention_variants().into_iter().chain(other_variants()) {
        let text = shader
            .expand(&templates)
            .unwrap_or_else(|e| panic!("{shader:?}: {e}"));
        *counts.entry(shader.kernel).or_insert(0) += 1;
        if texts.insert(text.clone())
            && let Err(e) = check(shader.kernel, &text)
        {
            panic!("{shader:?}: {e}");
        }
    }
    let all: usize = counts.values().sum();
    println!("{all} variants, {} texts: {counts:?}", texts.len());
    assert_eq!(all, 3193);
}

#[test]
fn every_file_of_a_kernel_is_in_the_list() {
    let known: HashSet<&str> = attention_variants()
        .iter()
        .chain(&other_variants())
        .map(|shader| shader.kernel)
        .collect();
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ending| ending == "wgsl") {
            let name = path.file_stem().unwrap().to_str().unwrap();
            assert!(known.contains(name), "{name}");
        }
    }
}

#[test]
fn bad_kernels_are_objected_to() {
    let good = "struct Params { m: u32, n: u32, k: u32, w_stride: u32 }
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
var<workgroup> wg: array<f32, 64>;
@compute @workgroup_size(64) fn main() { wg[0] = 0.0; y[P.m] = wg[0]; }";
    assert_eq!(check("matmul", good), Ok(()));
    for (from, to, word) in [
        ("y[P.m] =", "z[P.m] =", "no definition"),
        ("wg[0] = 0.0", "wg[0] = 0u", ""),
        ("array<f32, 64>", "array<f32, 4097>", "16388 bytes"),
        ("workgroup_size(64)", "workgroup_size(257)", "257 threads"),
        ("k: u32, w_stride", "w_stride", "12 bytes for 16"),
        ("binding(1)", "binding(2)", "bindings [0, 2]"),
        ("read_write", "read", ""),
        ("struct Params", "enable subgroups;\nstruct Params", ""),
        ("fn main()", "fn other()", "other"),
    ] {
        assert!(good.contains(from));
        let said = check("matmul", &good.replace(from, to)).expect_err(to);
        assert!(said.contains(word), "{to}: {said}");
    }
}

fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| Gpu::new().expect("a device: see scripts/with-gpu"))
}

#[test]
fn plans_ask_for_variants_of_the_list() {
    let listed: HashSet<Shader> = attention_variants().into_iter().collect();
    let mut full = gpu().caps().clone();
    full.f16 = true;
    let tensor = |dtype| gpu().empty("tensor", dtype, &[1 << 19]).unwrap();
    let inputs = [tensor(DType::F32), tensor(DType::F16)];
    let outputs = [tensor(DType::F32), tensor(DType::F16)];
    let kv_len = gpu().empty("kv_len", DType::U32, &[2]).unwrap();
    let rows = gpu().empty("rows", DType::U32, &[2, 130]).unwrap();
    fn view(tensor: &Tensor, [b, h, l, d]: [u32; 4], dense: bool) -> View<'_> {
        let gap = if dense { 0 } else { 1 };
        let row = d + gap;
        View::new(tensor, [b, h, l, d], gap, [h * l * row, l * row, row]).unwrap()
    }
    let mut asked = HashSet::new();
    let mut plans = 0;
    let routes = [
        (Route::ThreePass, None),
        (Route::Prefill, None),
        (Route::Decode, None),
        (Route::Decode, Some(2)),
    ];
    let mut ask = |[q_len, d, dv]: [u32; 3], types: [usize; 3], dense, causal, masks: [bool; 2]| {
        let [q, kv, out] = types;
        let tensors = Tensors {
            q: view(&inputs[q], [2, 2, q_len, d], dense),
            k: view(&inputs[kv], [2, 2, 130, d], dense),
            v: view(&inputs[kv], [2, 2, 130, dv], dense),
            out: view(&outputs[out], [2, 2, q_len, dv], dense),
            kv_len: masks[0].then_some(&kv_len),
            rows: masks[1].then_some(&rows),
            weights: None,
        };
        for (route, splits) in routes {
            let causal: Option<Align> = causal;
            let options = Options {
                causal: causal.is_some(),
                align: causal.unwrap_or_default(),
                route: Some(route),
                splits,
                ..Options::default()
            };
            let problem = Problem::new(&tensors, &options).unwrap();
            for launch in plan(&problem, &full).unwrap().launches {
                asked.insert(launch.shader);
            }
            plans += 1;
        }
    };
    let aligns = [None, Some(Align::BottomRight), Some(Align::TopLeft)];
    for types in 0..8 {
        for dense in BOTH {
            for causal in aligns {
                for masks in [[false, false], [false, true], [true, false], [true, true]] {
                    let types = [types & 1, types >> 1 & 1, types >> 2];
                    for q_len in [1, 9] {
                        ask([q_len, 12, 20], types, dense, causal, masks);
                    }
                }
            }
        }
    }
    for [d, dv] in DIMS {
        for q_len in [1, 2, 4, 9] {
            ask([q_len, d, dv], [0; 3], false, None, [false; 2]);
        }
    }
    println!("{plans} plans ask for {} variants", asked.len());
    for shader in &asked {
        assert!(listed.contains(shader), "{shader:?} is not in the list");
    }
}
