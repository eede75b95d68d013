//! From metadata to a model's shape, and from tensors to matrices on the device.

use std::path::Path;

use qkv::gguf::{Blocks, Gguf, Header};
use qkv::gpu::{DType, Recorder};
use qkv::model::{Columns, Outline, OutlineScaling, matrix};
use qkv::ops::{self, Epilogue, Linear, Storage};
use qkv::reference;

use crate::device::gpu;
use crate::goldens::smollm2;
use crate::writer::{File, text, value};

fn word(key: &str, n: u32) -> (String, Vec<u8>) {
    (key.into(), value(4, &n.to_le_bytes()))
}

fn float(key: &str, x: f32) -> (String, Vec<u8>) {
    (key.into(), value(6, &x.to_le_bytes()))
}

/// A model of two layers with f32 tensors of zeros.
fn model(architecture: &str) -> File {
    let mut file = File::new().with("general.architecture", value(8, &text(architecture)));
    let key = |name: &str| format!("{architecture}.{name}");
    file.metadata.extend([
        word(&key("embedding_length"), 12),
        word(&key("block_count"), 2),
        word(&key("attention.head_count"), 3),
        word(&key("attention.head_count_kv"), 1),
        word(&key("feed_forward_length"), 20),
        word(&key("context_length"), 99),
        float(&key("attention.layer_norm_rms_epsilon"), 1e-5),
        float(&key("rope.freq_base"), 5e5),
    ]);
    let mut shapes = vec![("token_embd.weight".to_string(), vec![12, 7])];
    shapes.push(("output_norm.weight".into(), vec![12]));
    for layer in 0..2 {
        let mut put = |name: &str, shape: &[u64]| {
            shapes.push((format!("blk.{layer}.{name}"), shape.to_vec()));
        };
        put("attn_q.weight", &[12, 12]);
        put("attn_k.weight", &[12, 4]);
        put("attn_v.weight", &[12, 4]);
        put("attn_output.weight", &[12, 12]);
        put("ffn_gate.weight", &[12, 20]);
        put("ffn_up.weight", &[12, 20]);
        put("ffn_down.weight", &[20, 12]);
        put("attn_norm.weight", &[12]);
        put("ffn_norm.weight", &[12]);
        if architecture == "qwen2" {
            put("attn_q.bias", &[12]);
            put("attn_k.bias", &[4]);
            put("attn_v.bias", &[4]);
        }
        if architecture == "qwen3" {
            put("attn_q_norm.weight", &[4]);
            put("attn_k_norm.weight", &[4]);
        }
    }
    for (name, shape) in shapes {
        let bytes = 4 * shape.iter().product::<u64>() as usize;
        file = file.tensor(&name, 0, &shape, &vec![0; bytes]);
    }
    file
}

fn outline(file: &File) -> qkv::Result<Outline> {
    Outline::new(&Header::parse(Path::new("m.gguf"), &file.bytes()).unwrap())
}

fn plain() -> Outline {
    Outline {
        width: 12,
        vocab: 7,
        layers: 2,
        heads: 3,
        kv_heads: 1,
        head_dim: 4,
        ffn: 20,
        norm_eps: 1e-5,
        qk_norm: false,
        qkv_bias: false,
        out_bias: false,
        window: None,
        max_positions: 99,
        rope_base: 5e5,
        rope_columns: 4,
        rope_neighbours: true,
        rope_scaling: OutlineScaling::None,
        tied_logits: true,
    }
}

#[test]
fn metadata_of_each_architecture_give_its_outline() {
    assert_eq!(outline(&model("llama")).unwrap(), plain());
    let halves = Outline {
        rope_neighbours: false,
        ..plain()
    };
    let qwen2 = Outline {
        qkv_bias: true,
        ..halves.clone()
    };
    assert_eq!(outline(&model("qwen2")).unwrap(), qwen2);
    let qwen3 = Outline {
        qk_norm: true,
        ..halves
    };
    assert_eq!(outline(&model("qwen3")).unwrap(), qwen3);

    let mut more = model("llama").tensor("output.weight", 0, &[12, 7], &[0; 336]);
    more = more.tensor("rope_freqs.weight", 0, &[2], &[0; 8]);
    more.metadata
        .push(word("llama.attention.sliding_window", 32));
    more.metadata.push(word("llama.rope.dimension_count", 4));
    let wanted = Outline {
        window: Some(32),
        rope_scaling: OutlineScaling::Factors,
        tied_logits: false,
        ..plain()
    };
    assert_eq!(outline(&more).unwrap(), wanted);

    let kind = |kind: &str| ("llama.rope.scaling.type".to_string(), value(8, &text(kind)));
    let mut linear = model("llama");
    linear
        .metadata
        .extend([kind("linear"), float("llama.rope.scaling.factor", 4.0)]);
    let scaling = OutlineScaling::Linear { factor: 4.0 };
    assert_eq!(outline(&linear).unwrap().rope_scaling, scaling);
    // Without a type a factor is linear, also under its older name, and 0 and 1 are none.
    for name in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        for (factor, scaling) in [
            (4.0, scaling),
            (1.0, OutlineScaling::None),
            (0.0, OutlineScaling::None),
        ] {
            let mut file = model("llama");
            file.metadata.push(float(name, factor));
            assert_eq!(outline(&file).unwrap().rope_scaling, scaling, "{name}");
        }
    }
    let mut none = model("llama");
    none.metadata
        .extend([kind("none"), float("llama.rope.scaling.factor", 4.0)]);
    assert_eq!(outline(&none).unwrap().rope_scaling, OutlineScaling::None);
    let mut yarn = model("llama");
    yarn.metadata
        .extend([kind("yarn"), float("llama.rope.scaling.factor", 2.0)]);
    assert!(outline(&yarn).is_err());
    yarn.metadata
        .push(word("llama.rope.scaling.original_context_length", 50));
    let scaling = OutlineScaling::Yarn {
        factor: 2.0,
        original: 50,
    };
    assert_eq!(outline(&yarn).unwrap().rope_scaling, scaling);
}

#[test]
fn files_that_contradict_themselves_are_refused() {
    let said = |change: &dyn Fn(&mut File)| {
        let mut file = model("llama");
        change(&mut file);
        outline(&file).expect_err("a refusal").to_string()
    };
    let drop = |f: &mut File, key: &str| f.metadata.retain(|(other, _)| other != key);
    let set = |f: &mut File, (key, value): (String, Vec<u8>)| {
        drop(f, &key);
        f.metadata.push((key, value));
    };
    type Change<'a> = &'a dyn Fn(&mut File);
    let cases: &[(Change, &str)] = &[
        (
            &|f| set(f, ("general.architecture".into(), value(8, &text("mamba")))),
            "mamba; llama",
        ),
        (&|f| drop(f, "general.architecture"), "absent; llama"),
        (
            &|f| drop(f, "llama.block_count"),
            "llama.block_count is absent",
        ),
        (
            &|f| set(f, word("llama.block_count", 0)),
            "llama.block_count is absent or 0",
        ),
        (
            &|f| set(f, word("llama.block_count", 3)),
            "no tensor blk.2.",
        ),
        (
            &|f| set(f, word("llama.block_count", u32::MAX)),
            "4294967295 layers with 20 tensors",
        ),
        (&|f| set(f, word("llama.block_count", 1)), "no place"),
        (
            &|f| set(f, word("llama.attention.head_count", 5)),
            "5 heads do not divide",
        ),
        (
            &|f| set(f, word("llama.attention.key_length", u32::MAX)),
            "values of 4294967295|no tensor|shape",
        ),
        (
            &|f| set(f, word("llama.attention.value_length", 8)),
            "columns have values of 8",
        ),
        (
            &|f| set(f, word("llama.attention.head_count_kv", 3)),
            "attn_k.weight has the shape [4, 12]",
        ),
        (&|f| set(f, word("llama.expert_count", 8)), "experts"),
        (
            &|f| drop(f, "llama.attention.layer_norm_rms_epsilon"),
            "rms_epsilon",
        ),
        (
            &|f| set(f, ("llama.context_length".into(), value(8, &text("long")))),
            "an integer",
        ),
        (
            &|f| f.tensors[0].name = "embd".into(),
            "no tensor token_embd.weight",
        ),
        (
            &|f| f.tensors[4].name = "blk.0.attn_z.weight".into(),
            "no tensor blk.0.attn_v.weight",
        ),
        (
            &|f| *f = f.clone().tensor("extra", 0, &[1], &[0; 4]),
            "extra has no place",
        ),
        (
            &|f| {
                set(
                    f,
                    (
                        "llama.rope.scaling.type".into(),
                        value(8, &text("longrope")),
                    ),
                )
            },
            "longrope; none, linear and yarn",
        ),
        (
            &|f| set(f, float("llama.rope.scale_linear", 0.5)),
            "llama.rope.scale_linear is 0.5",
        ),
        (
            &|f| {
                let flag = value(7, &[0]);
                set(f, ("llama.attention.causal".into(), flag))
            },
            "llama.attention.causal is false",
        ),
        (
            &|f| set(f, float("llama.rope.scaling.yarn_beta_fast", 16.0)),
            "16; 32",
        ),
    ];
    for (ix, (change, words)) in cases.iter().enumerate() {
        let said = said(*change);
        assert!(
            words.split('|').any(|word| said.contains(word)),
            "case {ix}, {words}: {said}"
        );
    }
}

#[test]
fn the_real_models_outline_is_smollm2s() {
    let Some(path) = smollm2() else {
        return;
    };
    let gguf = Gguf::open(&path).unwrap();
    let wanted = Outline {
        width: 576,
        vocab: 49152,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        ffn: 1536,
        max_positions: 8192,
        rope_base: 1e5,
        rope_columns: 64,
        ..plain()
    };
    assert_eq!(Outline::new(gguf.header()).unwrap(), wanted);

    // Its matrices beside what their blocks expand to.
    let part = |name: &str, n| (name.to_string(), n);
    for (names, k, columns, storage) in [
        (
            vec![
                part("blk.3.attn_q.weight", 576),
                part("blk.3.attn_k.weight", 192),
                part("blk.3.attn_v.weight", 192),
            ],
            576,
            Columns::SideBySide,
            Storage::Q4_1,
        ),
        (
            vec![
                part("blk.29.ffn_gate.weight", 1536),
                part("blk.29.ffn_up.weight", 1536),
            ],
            576,
            Columns::InTurns,
            Storage::Q4_1,
        ),
        (
            vec![part("blk.0.ffn_down.weight", 576)],
            1536,
            Columns::SideBySide,
            Storage::Q4_1,
        ),
        (
            vec![part("token_embd.weight", 49152)],
            576,
            Columns::SideBySide,
            Storage::Q8_0,
        ),
    ] {
        let started = std::time::Instant::now();
        judge(&gguf, &names, k, columns, storage);
        println!("{names:?}: {:?}", started.elapsed());
    }
}

/// Makes a matrix, multiplies a row by it, and compares with the expanded blocks.
fn judge(gguf: &Gguf, names: &[(String, u32)], k: u32, columns: Columns, storage: Storage) {
    let gpu = gpu();
    let weight = matrix(gpu, gguf, names, k, columns, DType::F32).unwrap();
    assert_eq!((weight.storage(), weight.k()), (storage, k), "{names:?}");
    let parts: Vec<Vec<f32>> = names
        .iter()
        .map(|(name, n)| gguf.floats(name, &[*n, k]).unwrap())
        .collect();
    let rows: Vec<&[f32]> = match columns {
        Columns::SideBySide => parts
            .iter()
            .flat_map(|part| part.chunks(k as usize))
            .collect(),
        Columns::InTurns => (0..names[0].1 as usize)
            .flat_map(|ix| {
                parts
                    .iter()
                    .map(move |part| &part[ix * k as usize..][..k as usize])
            })
            .collect(),
    };
    let narrow = |x: f32| match storage {
        Storage::F16 => half::f16::from_f32(x).to_f64(),
        _ => x.into(),
    };
    let values: Vec<f64> = rows.concat().into_iter().map(narrow).collect();
    let x: Vec<f32> = (0..k).map(|ix| (ix as f32 * 0.7).sin()).collect();
    let want = reference::linear(
        &x.iter().map(|&x| x.into()).collect::<Vec<f64>>(),
        k as usize,
        &values,
        None,
    );
    let n = want.len() as u32;
    let x = gpu.upload_floats("x", DType::F32, &[1, k], &x).unwrap();
    let y = gpu.empty("y", DType::F32, &[1, n]).unwrap();
    let linear = Linear {
        weight,
        bias: None,
        n,
    };
    let mut recorder = Recorder::new(gpu);
    ops::matmul(&mut recorder, &x, &linear, &y, Epilogue::default()).unwrap();
    gpu.run(&recorder.finish().unwrap()).unwrap();
    let largest = want.iter().fold(0.0f64, |most, y| most.max(y.abs()));
    for (ix, (got, want)) in gpu.read_floats(&y).unwrap().iter().zip(&want).enumerate() {
        let off = (f64::from(*got) - want).abs();
        assert!(
            off <= 2e-5 * largest,
            "{names:?} column {ix}: {got} for {want}"
        );
    }
}

#[test]
fn every_type_becomes_the_matrix_that_is_promised() {
    let all = [
        ("f32", 0, Blocks::F32),
        ("f16", 1, Blocks::F16),
        ("bf16", 30, Blocks::BF16),
        ("q8_0", 8, Blocks::Q8_0),
        ("q4_0", 2, Blocks::Q4_0),
        ("q4_1", 3, Blocks::Q4_1),
        ("q5_0", 6, Blocks::Q5_0),
        ("q4_k", 12, Blocks::Q4_K),
        ("q6_k", 14, Blocks::Q6_K),
    ];
    let mut file = File::new();
    for (ix, (name, ty, blocks)) in all.into_iter().enumerate() {
        // Bytes whose halves, wherever they stand in a block, are small and finite.
        let n = 256 * 9 / blocks.elements() * blocks.bytes();
        let byte = |at: usize| ((at * 37 + ix) % 39) as u8;
        let bytes: Vec<u8> = match blocks {
            Blocks::F32 => (0..n / 4)
                .flat_map(|at| (at as f32 * 0.1).cos().to_le_bytes())
                .collect(),
            _ => (0..n).map(byte).collect(),
        };
        file = file.tensor(name, ty, &[256, 9], &bytes);
    }
    file = file.tensor(
        "large",
        0,
        &[256, 9],
        bytemuck::cast_slice(&[1e5f32; 256 * 9]),
    );
    let named = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(named.path(), file.bytes()).unwrap();
    let gguf = Gguf::open(named.path()).unwrap();
    let f16 = if gpu().caps().f16 {
        Storage::F16
    } else {
        Storage::F32
    };
    let one = |name: &str| vec![(name.to_string(), 9)];
    for (name, storage) in [
        ("f32", Storage::F32),
        ("f16", f16),
        ("bf16", Storage::F32),
        ("q8_0", Storage::Q8_0),
        ("q4_0", Storage::Q4_0),
        ("q4_1", Storage::Q4_1),
        ("q5_0", Storage::Q8_0),
        ("q4_k", f16),
        ("q6_k", f16),
    ] {
        judge(&gguf, &one(name), 256, Columns::SideBySide, storage);
        let two = [one(name), one(name)].concat();
        judge(&gguf, &two, 256, Columns::InTurns, storage);
    }
    let mixed = [one("q8_0"), one("q4_0")].concat();
    judge(&gguf, &mixed, 256, Columns::SideBySide, f16);
    judge(
        &gguf,
        &[one("q4_0"), one("large")].concat(),
        256,
        Columns::SideBySide,
        Storage::F32,
    );

    let make = |names: &[(String, u32)], columns| {
        let made = matrix(gpu(), &gguf, names, 256, columns, DType::F32);
        made.expect_err("a refusal").to_string()
    };
    assert!(make(&[("none".into(), 9)], Columns::SideBySide).contains("no tensor none"));
    assert!(make(&[("f32".into(), 8)], Columns::SideBySide).contains("[9, 256]; [8, 256]"));
    assert!(make(&[], Columns::SideBySide).contains("one at least"));
}
