//! Every variant that plans and ops ask for through naga's parser and validator, within the limits that
//! every device grants.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use device::gpu;
use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, StorageAccess, TypeInner};
use qkv::gpu::templates;

mod compilers;
#[path = "../support/device.rs"]
mod device;
mod variants;

use variants::{attention_variants, other_variants};

/// How many variants there are, and how many different texts they make.
const VARIANTS: usize = 25_994;
const TEXTS: usize = 22_082;
/// Texts among them that no browser is given: cooperative matrices are naga's own extension.
const COOP_TEXTS: usize = 2_056;

/// Bytes of each kernel's parameters on the host's side.
fn params_bytes(kernel: &str) -> u32 {
    match kernel {
        "scores" | "softmax" | "values" | "prefill" | "prefill_coop" | "prefill_lanes"
        | "decode" | "decode_lanes" | "merge" | "block_map" | "pack" => 288,
        "combine" => 64,
        "append" => 48,
        "embed" => 32,
        "matmul" | "matmul_coop" | "norm" | "choose" | "reorder" | "copy_page" | "sample"
        | "limits" => 16,
        other => panic!("{other} is not in the list"),
    }
}

/// Parses, validates and measures one kernel; the error says what is wrong.
fn check(kernel: &str, text: &str) -> Result<(), String> {
    // Capabilities that extensions stand for, of which f16, subgroups and cooperative matrices are used; and
    // unpacking f16 to f32, which is a capability to naga and every WebGPU device's.
    let capabilities = Capabilities::SHADER_FLOAT16
        | Capabilities::COOPERATIVE_MATRIX
        | Capabilities::SUBGROUP
        | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
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
    // Where no more is offered: WebGPU's least limits, and what devices with cooperative matrices have.
    let memory = match kernel {
        "prefill_coop" | "matmul_coop" => 32_768,
        _ => 16_384,
    };
    if workgroup > memory || storage > 8 {
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
    let (mut texts, mut coop_texts) = (HashSet::new(), 0);
    for shader in attention_variants().iter().cloned().chain(other_variants()) {
        let text = shader
            .expand(&templates)
            .unwrap_or_else(|e| panic!("{shader:?}: {e}"));
        *counts.entry(shader.kernel).or_insert(0) += 1;
        if texts.insert(text.clone()) {
            coop_texts += usize::from(shader.kernel.ends_with("_coop"));
            if let Err(e) = check(shader.kernel, &text) {
                panic!("{shader:?}: {e}");
            }
        }
    }
    let all: usize = counts.values().sum();
    let texts = texts.len();
    println!("{all} variants, {texts} texts, {coop_texts} of matrices: {counts:?}");
    assert_eq!((all, texts, coop_texts), (VARIANTS, TEXTS, COOP_TEXTS));
}

/// Writes what browsers are given, each text once, for tests/dawn/check.mjs to hold against their compiler.
#[test]
#[ignore = "for tests/dawn/check, which names a folder"]
fn texts_for_browsers() {
    let folder = std::env::var("QKV_TEXTS").expect("QKV_TEXTS names a folder");
    let folder = std::path::Path::new(&folder);
    let mut templates = templates();
    templates.add_global("BROWSER", true);
    let mut texts = BTreeSet::new();
    for shader in attention_variants().iter().cloned().chain(other_variants()) {
        if !shader.kernel.ends_with("_coop") {
            texts.insert((shader.kernel, shader.expand(&templates).unwrap()));
        }
    }
    for (ix, (kernel, text)) in texts.iter().enumerate() {
        std::fs::write(folder.join(format!("{ix:04}-{kernel}.wgsl")), text).unwrap();
    }
    std::fs::write(folder.join("count"), texts.len().to_string()).unwrap();
    println!("{} texts", texts.len());
    assert_eq!(texts.len(), TEXTS - COOP_TEXTS);
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
