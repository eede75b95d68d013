//! Steps of a decoder-only model over sequences in pages: tokens a second by batch, context and cache type, with
//! what the sequences share read by each and read once, and the host's part of a step.
//!
//! ```text
//! QKV_MODEL="$(scripts/fetch-smollm2)" cargo bench --bench decode -- [f32 q8_0 ..] [128 4096 ..] [1 8 32 ..]
//! QKV_HF_PYTHON=python3 QKV_MODEL=... cargo bench --bench decode     # beside transformers on the CPU
//! QKV_LLAMA_PYTHON=python3 QKV_MODEL=... cargo bench --bench decode  # beside llama.cpp on the CPU
//! QKV_ORT_PYTHON=python3 QKV_MODEL=... cargo bench --bench decode    # beside ONNX Runtime on the same device
//! ```
//!
//! A context of so many tokens is read once; the batch's sequences are forks of it, each with tokens of its own. The
//! steps' logits are checked before anything is timed: a fork alone gives the same bits as in the batch, and a
//! cascade the same but for rounding. Times are of whole steps: page tables, recording, the device, and the wait.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use qkv::cache::{Keep, PagedCache, SequenceId};
use qkv::gpu::{DType, Gpu, Recorder, Recording, Tensor};
use qkv::model::{CausalModel, Source};

const BATCHES: [usize; 3] = [1, 8, 32];
const CONTEXTS: [usize; 2] = [128, 4096];
const TYPES: [DType; 4] = [DType::F32, DType::F16, DType::Q8_0, DType::Q4_0];
const PAGE: u32 = 16;
/// Tokens of a step that reads the context.
const CHUNK: usize = 256;
/// Steps of each kind that are timed.
const STEPS: usize = 5;

fn main() -> qkv::Result<()> {
    let Some(path) = std::env::var_os("QKV_MODEL").map(PathBuf::from) else {
        println!(
            "QKV_MODEL is not set: a GGUF file or a directory; scripts/fetch-smollm2 fetches one"
        );
        return Ok(());
    };
    let words: Vec<String> = std::env::args().skip(1).collect();
    let among = |names: Vec<String>| -> Vec<bool> {
        let none = !names.iter().any(|name| words.contains(name));
        names
            .iter()
            .map(|name| none || words.contains(name))
            .collect()
    };
    let gpu = Gpu::new()?.untuned();
    let source = Source::at(path.clone());
    let model = CausalModel::load(&gpu, &source, DType::F32, &mut |_, _| {})?;
    println!(
        "{}; {}",
        gpu.caps().name,
        path.file_name().unwrap_or_default().display()
    );
    println!(
        "host's part of a step of one sequence: {:.0} µs",
        host_us(&model)?
    );
    print!("\ncache  context  batch  tokens/s  cascade tokens/s  times  step ms");
    for [_, _, name] in PEERS {
        print!("{:>22}  ours/it", format!("{name} tokens/s"));
    }
    println!();
    let types = among(TYPES.map(|dtype| dtype.name().into()).to_vec());
    let contexts = among(CONTEXTS.map(|n| n.to_string()).to_vec());
    let wanted = among(BATCHES.map(|n| n.to_string()).to_vec());
    let batches = BATCHES.into_iter().zip(wanted);
    let batches: Vec<usize> = batches
        .filter_map(|(n, wanted)| wanted.then_some(n))
        .collect();
    for (context, _) in CONTEXTS.iter().zip(contexts).filter(|(_, wanted)| *wanted) {
        let theirs: Vec<Peers> = batches
            .iter()
            .map(|&batch| PEERS.map(|peer| peer_seconds(peer, &path, batch, *context)))
            .collect();
        for (dtype, _) in TYPES.iter().zip(&types).filter(|(_, wanted)| **wanted) {
            if *dtype == DType::F16 && !gpu.caps().f16 {
                continue;
            }
            by_batch(&model, &batches, &theirs, *context, *dtype)?;
        }
    }
    Ok(())
}

/// A text without end, the same in every run.
fn token(model: &CausalModel, at: usize) -> u32 {
    (at as u32).wrapping_mul(2_654_435_761) % model.spec().vocab
}

struct Step {
    recording: Recording,
    logits: Tensor,
}

/// A step over the last token of each sequence, `at` the number of the step; by itself or as a cascade.
fn step(
    model: &CausalModel,
    cache: &mut PagedCache,
    ids: &[SequenceId],
    at: usize,
    cascade: bool,
) -> qkv::Result<Step> {
    let mut recorder = Recorder::new(model.gpu());
    let mut new = Vec::with_capacity(ids.len());
    for (s, &id) in ids.iter().enumerate() {
        cache.append(
            &mut recorder,
            id,
            &[token(model, 1_000_000 + 1000 * at + s)],
        )?;
        new.push((id, 1));
    }
    let step = match cascade {
        true => model.cascade_step(cache, &new)?,
        false => model.paged_step(cache, &new)?,
    };
    let shape = [ids.len() as u32, model.spec().vocab];
    let logits = model.gpu().empty("logits", DType::F32, &shape)?;
    model.record_paged_step(&mut recorder, cache, &step, &logits)?;
    Ok(Step {
        recording: recorder.finish()?,
        logits,
    })
}

fn by_batch(
    model: &CausalModel,
    batches: &[usize],
    theirs: &[Peers],
    context: usize,
    dtype: DType,
) -> qkv::Result<()> {
    let gpu = model.gpu();
    let most = batches.iter().copied().max().unwrap_or(1) as u32;
    let own = (2 * (STEPS as u32 + 1)).div_ceil(PAGE) + 1;
    let pages = (context as u32).div_ceil(PAGE) + (most + 1) * own;
    let mut cache = model.paged_cache([dtype; 2], pages, PAGE)?;
    let text: Vec<u32> = (0..context).map(|at| token(model, at)).collect();
    let base = cache.start(&text, Keep::default());
    for chunk in text.chunks(CHUNK) {
        let mut recorder = Recorder::new(gpu);
        cache.append(&mut recorder, base, chunk)?;
        let step = model.paged_step(&cache, &[(base, chunk.len() as u32)])?;
        let logits = gpu.empty("logits", DType::F32, &[1, model.spec().vocab])?;
        model.record_paged_step(&mut recorder, &cache, &step, &logits)?;
        gpu.run(&recorder.finish()?)?;
    }
    for (&batch, theirs) in batches.iter().zip(theirs) {
        let ids = (0..batch)
            .map(|_| cache.fork(base))
            .collect::<qkv::Result<Vec<_>>>()?;
        let logits = |cache: &mut PagedCache, ids: &[SequenceId], cascade| {
            let step = step(model, cache, ids, 0, cascade)?;
            gpu.run(&step.recording)?;
            for &id in ids {
                cache.truncate(id, context as u32)?;
            }
            gpu.read_floats(&step.logits)
        };
        let alone = logits(&mut cache, &ids[..1], false)?;
        let together = logits(&mut cache, &ids, false)?;
        assert!(
            together[..alone.len()] == alone[..],
            "the batch changes its first sequence"
        );
        let cascade = logits(&mut cache, &ids, true)?;
        let top = together.iter().fold(0f32, |top, x| top.max(x.abs()));
        let off = together
            .iter()
            .zip(&cascade)
            .fold(0f32, |off, (a, b)| off.max((a - b).abs()));
        // Where the step's own keys and values lie between two quants, rounding decides.
        let allowed = if dtype.is_quantized() { 0.05 } else { 1e-3 };
        assert!(off <= allowed * top, "a cascade is off by {off} of {top}");

        // In turns; a fork's own tokens grow by two a turn.
        let mut times = [Vec::new(), Vec::new()];
        for at in 0..STEPS {
            for (cascade, times) in [false, true].into_iter().zip(&mut times) {
                let started = Instant::now();
                let step = step(model, &mut cache, &ids, at, cascade)?;
                gpu.run(&step.recording)?;
                times.push(started.elapsed().as_secs_f64());
            }
        }
        for id in ids {
            cache.remove(id)?;
        }
        let [plain, cascade] = times.map(median);
        let rate = |seconds: f64| batch as f64 / seconds;
        print!(
            "{:<5}{context:>9}{batch:>7}{:>10.1}{:>18.1}{:>7.2}{:>9.0}",
            dtype.name(),
            rate(plain),
            rate(cascade),
            plain / cascade,
            plain * 1e3,
        );
        for theirs in theirs {
            match theirs {
                Some(seconds) => print!("{:>22.1}{:>9.2}", rate(*seconds), seconds / plain),
                None => print!("{:31}", ""),
            }
        }
        println!();
    }
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// What the host does for a step that is recorded once: its commands, encoded and dropped. Microseconds.
fn host_us(model: &CausalModel) -> qkv::Result<f64> {
    let gpu = model.gpu();
    let cache = model.cache([model.dtype(); 2], 1, 64)?;
    let ids = gpu.upload_u32("ids", &[1], &[token(model, 0)])?;
    gpu.write(&cache.lengths, bytemuck::cast_slice(&[1u32]))?;
    let logits = gpu.empty("logits", DType::F32, &[1, model.spec().vocab])?;
    let mut recorder = Recorder::new(gpu);
    let chunk = qkv::model::Chunk::one(&ids);
    model.record_step(&mut recorder, &cache, &chunk, &logits)?;
    let recording = recorder.finish()?;
    gpu.run(&recording)?;
    let times = (0..100).map(|_| {
        let started = Instant::now();
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        recording.encode(&mut encoder);
        drop(encoder.finish());
        started.elapsed().as_secs_f64() * 1e6
    });
    Ok(median(times.collect()))
}

/// Where a peer's Python is named, the script that it runs, and its name.
const PEERS: [[&str; 3]; 3] = [
    ["QKV_HF_PYTHON", "decode_hf.py", "transformers"],
    ["QKV_LLAMA_PYTHON", "decode_llama.py", "llama.cpp"],
    ["QKV_ORT_PYTHON", "decode_ort.py", "ort"],
];

/// Seconds of a step in each.
type Peers = [Option<f64>; PEERS.len()];

/// Seconds of a step in a peer, where its variable names a Python that has it.
fn peer_seconds(
    [python, script, _]: [&str; 3],
    path: &Path,
    batch: usize,
    context: usize,
) -> Option<f64> {
    let python = std::env::var_os(python)?;
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers");
    let output = Command::new(python)
        .arg(Path::new(folder).join(script))
        .arg(path)
        .args([batch, context, STEPS].map(|n| n.to_string()))
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let seconds = text.trim().parse().ok();
    if seconds.is_none() {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    }
    seconds
}
