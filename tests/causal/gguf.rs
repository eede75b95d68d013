//! The small models of the known families as GGUF files, as llama.cpp's converter writes them.

use std::collections::BTreeMap;
use std::path::Path;

use qkv::gguf::Blocks;
use qkv::gpu::DType;
use qkv::model::{CausalModel, RopeScaling, Source};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::grid::Random;
use crate::transformers::{Golden, worst};
use crate::writer::{File, text, value};
use crate::{gpu, singles};

/// Shapes, outermost extent first, and values.
type Floats = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The tensors of a golden directory.
fn tensors(dir: &Path) -> Floats {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if !name.starts_with("model") || !name.ends_with(".safetensors") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let words = view.data().as_chunks::<2>().0.iter();
            let values: Vec<f32> = match view.dtype() {
                Dtype::F32 => bytemuck::pod_collect_to_vec(view.data()),
                Dtype::F16 => words.map(|&b| half::f16::from_le_bytes(b).into()).collect(),
                Dtype::BF16 => words
                    .map(|&b| half::bf16::from_le_bytes(b).into())
                    .collect(),
                other => panic!("{other:?}"),
            };
            all.insert(name.to_string(), (view.shape().to_vec(), values));
        }
    }
    all
}

/// Rows of heads whose column i turns with i + D / 2, sorted so that 2 i turns with 2 i + 1.
fn neighbours(values: &[f32], head_dim: usize, row: usize) -> Vec<f32> {
    let mut out = Vec::new();
    for head in values.chunks(head_dim * row) {
        for ix in 0..head_dim {
            let from = ix / 2 + ix % 2 * (head_dim / 2);
            out.extend(&head[from * row..][..row]);
        }
    }
    out
}

/// A golden directory as one file of f32 tensors. `blocks` are tensors that lie in blocks instead.
fn file(golden: &Golden, blocks: &BTreeMap<String, (Blocks, Vec<u8>)>) -> File {
    let config = std::fs::read(golden.dir.join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let n = |key: &str| config[key].as_u64().map(|n| n as u32);
    let family = config["model_type"].as_str().unwrap();
    let heads = n("num_attention_heads").unwrap();
    let head_dim = n("head_dim").unwrap_or(n("hidden_size").unwrap() / heads);
    let mut file = File::new().with("general.architecture", value(8, &text(family)));
    for (key, n) in [
        ("embedding_length", n("hidden_size").unwrap()),
        ("block_count", n("num_hidden_layers").unwrap()),
        ("attention.head_count", heads),
        ("attention.head_count_kv", n("num_key_value_heads").unwrap()),
        ("attention.key_length", head_dim),
        ("attention.value_length", head_dim),
        ("feed_forward_length", n("intermediate_size").unwrap()),
        ("context_length", n("max_position_embeddings").unwrap()),
    ] {
        file = file.with(&format!("{family}.{key}"), value(4, &n.to_le_bytes()));
    }
    let rope = &config["rope_parameters"];
    let base = rope["rope_theta"].as_f64().unwrap();
    let eps = config["rms_norm_eps"].as_f64().unwrap();
    for (key, x) in [
        ("attention.layer_norm_rms_epsilon", eps),
        ("rope.freq_base", base),
    ] {
        let x = (x as f32).to_le_bytes();
        file = file.with(&format!("{family}.{key}"), value(6, &x));
    }
    for (name, (shape, mut values)) in tensors(&golden.dir) {
        let turns = name.contains("q_proj") || name.contains("k_proj");
        if family == "llama" && turns {
            let row = shape.get(1).copied().unwrap_or(1);
            values = neighbours(&values, head_dim as usize, row);
        }
        let name = name
            .replace("model.layers.", "blk.")
            .replace("model.embed_tokens", "token_embd")
            .replace("self_attn.q_norm", "attn_q_norm")
            .replace("self_attn.k_norm", "attn_k_norm")
            .replace("self_attn.o_proj", "attn_output")
            .replace("self_attn.", "attn_")
            .replace("mlp.", "ffn_")
            .replace("_proj", "")
            .replace("input_layernorm", "attn_norm")
            .replace("post_attention_layernorm", "ffn_norm")
            .replace("model.norm", "output_norm")
            .replace("lm_head", "output");
        let extents: Vec<u64> = shape.iter().rev().map(|&n| n as u64).collect();
        file = match blocks.get(&name) {
            Some((ty, bytes)) => file.tensor(&name, number(*ty), &extents, bytes),
            None => file.tensor(&name, 0, &extents, bytemuck::cast_slice(&values)),
        };
    }
    file
}

/// ggml's number of a type.
fn number(blocks: Blocks) -> u32 {
    match blocks {
        Blocks::F32 => 0,
        Blocks::Q4_0 => 2,
        Blocks::Q4_1 => 3,
        Blocks::Q8_0 => 8,
        other => panic!("{other:?}"),
    }
}

fn load(file: &File, dtype: DType) -> CausalModel {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    let mut heard = (0, 1);
    let listen = &mut |done, all| heard = (done, all);
    let model = CausalModel::load(gpu(), &Source::at(path), dtype, listen).unwrap();
    // All but a frequency's factors, which are no weights.
    assert!(heard.0 + 13 > heard.1 && heard.0 <= heard.1, "{heard:?}");
    model
}

#[test]
fn gguf_files_of_the_families_equal_transformers() {
    for name in ["llama", "qwen3"] {
        let golden = Golden::new(name);
        let model = load(&file(&golden, &BTreeMap::new()), DType::F32);
        let tokens = golden.tokens();
        let forward = model.forward(&tokens, false).unwrap();
        let (shape, want) = golden.floats("logits");
        let got = gpu().read_floats(&forward.logits).unwrap();
        let logits = worst(&got, &want, shape[2], |_| true);
        println!("{name}: logits {logits:.1e}");
        assert!(logits <= 1e-3, "{name}");
    }
}

#[test]
fn frequencies_factors_are_llama_3s_scaling() {
    let golden = Golden::new("llama");
    let directory = golden.model(DType::F32);
    let mut spec = directory.spec().clone();
    let (columns, base) = (f64::from(spec.rope.columns), spec.rope.base);
    let (factor, low, high, original) = (8.0, 1.0, 4.0, 16u32);
    spec.rope.scaling = RopeScaling::Llama3 {
        factor,
        low,
        high,
        original,
    };
    let source = Source::Directory(golden.dir.clone());
    let want = CausalModel::load_spec(gpu(), &source, &spec, DType::F32, &mut |_, _| {}).unwrap();
    let factors: Vec<f32> = (0..spec.rope.columns / 2)
        .map(|pair| {
            let frequency = base.powf(-2.0 * f64::from(pair) / columns);
            let turns = f64::from(original) * frequency / std::f64::consts::TAU;
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - kept) / factor + kept)) as f32
        })
        .collect();
    let extents = [factors.len() as u64];
    let scaled = file(&golden, &BTreeMap::new()).tensor(
        "rope_freqs.weight",
        0,
        &extents,
        bytemuck::cast_slice(&factors),
    );
    let tokens = golden.tokens();
    let logits = |model: &CausalModel| {
        let forward = model.forward(&tokens, false).unwrap();
        gpu().read_floats(&forward.logits).unwrap()
    };
    let want: Vec<f64> = logits(&want).into_iter().map(f64::from).collect();
    let got = logits(&load(&scaled, DType::F32));
    let off = worst(&got, &want, 96, |_| true);
    let plain = worst(&logits(&directory), &want, 96, |_| true);
    println!("{factors:?}: off by {off:.1e}, unscaled by {plain:.1e}");
    assert!(off <= 2e-5 && plain > 1e-3);
}

#[test]
fn weights_in_blocks_give_the_logits_of_the_same_weights_as_floats() {
    let golden = Golden::new("qwen3");
    let random = &mut Random::new(11);
    let (mut in_blocks, mut expanded) = (BTreeMap::new(), BTreeMap::new());
    for (name, ty, rows) in [
        ("token_embd.weight", Blocks::Q8_0, 96),
        // Of one type beside each other, in turns, and of several types.
        ("blk.0.attn_q.weight", Blocks::Q4_1, 80),
        ("blk.0.attn_k.weight", Blocks::Q4_1, 20),
        ("blk.0.attn_v.weight", Blocks::Q4_1, 20),
        ("blk.0.ffn_gate.weight", Blocks::Q8_0, 48),
        ("blk.0.ffn_up.weight", Blocks::Q8_0, 48),
        ("blk.1.attn_q.weight", Blocks::Q4_0, 80),
        ("blk.1.attn_k.weight", Blocks::Q8_0, 20),
        ("blk.1.ffn_gate.weight", Blocks::Q4_0, 48),
        ("blk.1.ffn_up.weight", Blocks::Q4_0, 48),
    ] {
        let halves = if ty == Blocks::Q4_1 { 2 } else { 1 };
        let unit = if ty == Blocks::Q8_0 { 0.002 } else { 0.03 };
        let mut bytes = Vec::new();
        for _ in 0..rows {
            for half in 0..halves {
                let scale = if half == 0 { unit } else { -8.0 * unit };
                bytes.extend(half::f16::from_f64(scale).to_le_bytes());
            }
            let quants = ty.bytes() - 2 * halves;
            bytes.extend((0..quants).map(|_| random.below(256) as u8));
        }
        let floats = ty.expand(&bytes);
        in_blocks.insert(name.to_string(), (ty, bytes));
        let floats = bytemuck::cast_slice(&floats).to_vec();
        expanded.insert(name.to_string(), (Blocks::F32, floats));
    }
    let tokens = golden.tokens();
    let logits = |blocks| {
        let model = load(&file(&golden, blocks), DType::F32);
        let forward = model.forward(&tokens, false).unwrap();
        gpu().read_floats(&forward.logits).unwrap()
    };
    let (got, want) = (logits(&in_blocks), logits(&expanded));
    let want: Vec<f64> = want.into_iter().map(f64::from).collect();
    let largest = want.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    let off = worst(&got, &want, 96, |_| true) / largest;
    println!("logits up to {largest:.2}, off by {off:.1e} of that");
    // Mixed types are expanded to f16, which holds these exactly but for the products of scale and integer.
    assert!(largest > 0.1 && off <= 2e-3, "{off}");
    assert_ne!(got, singles(&want));
}
