//! Writers of what the compilers of GPUs are asked about.

use std::collections::{BTreeMap, HashSet};

use qkv::attention::{Options, Problem, Route, Tensors, View, plan};
use qkv::gpu::{DType, Matrices, Shader, templates};

use crate::gpu;
use crate::variants::{GPUS, TYPES, attention_of, matrix, other_variants, others_of};

/// Writes each route's products as planned for a device with 64 lanes and for one with 8 to 32, for
/// benches/peers/compilers.py: 32 query heads on 8 KV heads, D 64 and 128, f32 and f16; `prefill` also with
/// products in f16, and on matrices.
#[test]
#[ignore = "for benches/peers/compilers.py; QKV_TEXTS names a folder"]
fn texts_for_compilers() {
    let folder = std::env::var("QKV_TEXTS").expect("QKV_TEXTS names a folder");
    let mut caps = gpu().caps().without_f16();
    (caps.f16, caps.f16_math, caps.software) = (true, true, false);
    for (lanes, subgroups, matrices) in [
        ("64", (64, 64), None),
        ("8-32", (8, 32), None),
        ("64 (matrices)", (32, 64), Some(16)),
    ] {
        caps.subgroups = Some(subgroups);
        caps.cooperative = matrices.into_iter().map(matrix).collect();
        caps.matrices = Matrices::Used;
        for (d, dtype) in [64, 128]
            .into_iter()
            .flat_map(|d| TYPES[..2].iter().map(move |t| (d, *t)))
        {
            let f16_math = dtype == DType::F16;
            for (route, q_len, f16_math) in [
                (Route::ThreePass, 512, false),
                (Route::Prefill, 512, false),
                (Route::Prefill, 512, f16_math),
                (Route::Decode, 1, false),
            ] {
                let make = |h, l| gpu().empty("tensor", dtype, &[1, h, l, d]).unwrap();
                let [q, k, v, out] = [make(32, q_len), make(8, 512), make(8, 512), make(32, q_len)];
                let view = |tensor| View::bhld(tensor).unwrap();
                let tensors = Tensors::new(view(&q), view(&k), view(&v), view(&out));
                let options = Options {
                    route: Some(route),
                    f16_math,
                    ..Options::default()
                };
                let plan = plan(&Problem::new(&tensors, &options).unwrap(), &caps).unwrap();
                for launch in &plan.launches {
                    let kernel = launch.shader.kernel;
                    if (kernel == "prefill_coop") != matrices.is_some() || kernel == "softmax" {
                        continue;
                    }
                    // Three passes are the peers of `prefill`.
                    let (side, note) = match route {
                        Route::ThreePass => ("prefill", format!(" ({kernel})")),
                        Route::Prefill if f16_math && matrices.is_none() => {
                            ("prefill", " (f16 math)".into())
                        }
                        Route::Prefill => ("prefill", String::new()),
                        Route::Decode => ("decode", String::new()),
                    };
                    let name = format!("{side}-{}-{d}-{lanes}{note}.wgsl", dtype.name());
                    let text = launch.shader.expand(&templates()).unwrap();
                    std::fs::write(std::path::Path::new(&folder).join(name), text).unwrap();
                }
            }
        }
    }
    let known: HashSet<Shader> = other_variants().into_iter().collect();
    for (rows, storage) in [1, 4, 8]
        .into_iter()
        .flat_map(|rows| ["f32", "f16", "q8_0", "q4_0"].map(|storage| (rows, storage)))
    {
        let t = if storage == "f32" { "f32" } else { "f16" };
        let product = |kernel| {
            let shader = Shader::new(kernel)
                .with("F16", t == "f16")
                .with("T", t)
                .with("O_TYPE", t)
                .with("W_TYPE", storage)
                .with("VEC", 4u32)
                .with("HAS_BIAS", false)
                .with("HAS_RESIDUAL", false)
                .with("GATED", false)
                .with("ACTIVATION", "none")
                .with("BY_LANES", false);
            match kernel == "matmul_coop" || storage.starts_with('q') {
                true => shader.with("SOFTWARE", false),
                false => shader,
            }
        };
        let few = product("matmul")
            .with("ROWS", rows)
            .with("SLICES", 8u32)
            .with("SPLIT", rows == 1);
        let many = product("matmul_coop")
            .with("M", 16u32)
            .with("LANES", 64u32)
            .with("FIXED", false)
            .with("PLAIN", false);
        let texts = [(few, ""), (many, " (matrices)")];
        for (shader, part) in &texts[..if rows == 8 && t == "f16" { 2 } else { 1 }] {
            assert!(known.contains(shader), "{shader:?}");
            let name = format!("product-{storage}-{rows}{part}.wgsl");
            let text = shader.expand(&templates()).unwrap();
            std::fs::write(std::path::Path::new(&folder).join(name), text).unwrap();
        }
    }
}

/// Writes what plans and operations ask for on each of some GPUs into a folder of its name, each text once.
#[test]
#[ignore = "for benches/peers/compilers.py --spills; QKV_TEXTS names a folder"]
fn texts_of_gpus_for_compilers() {
    let folder = std::env::var("QKV_TEXTS").expect("QKV_TEXTS names a folder");
    let templates = templates();
    for (gpu, devices) in GPUS {
        let folder = std::path::Path::new(&folder).join(gpu);
        std::fs::create_dir_all(&folder).unwrap();
        let mut texts = BTreeMap::new();
        for &device in devices {
            for shader in attention_of(device).into_iter().chain(others_of(device)) {
                texts.insert(shader.expand(&templates).unwrap(), shader);
            }
        }
        for (ix, (text, shader)) in texts.iter().enumerate() {
            let name = format!("{ix:04}-{}.wgsl", shader.kernel);
            std::fs::write(folder.join(name), format!("// {shader:?}\n{text}")).unwrap();
        }
        println!("{gpu}: {} texts", texts.len());
    }
}
