//! Translating with the embedded model: sentences a second, time to the first token, host time a step.
//!
//!     cargo bench --bench translate
//!     QKV_HF_PYTHON=python3 cargo bench --bench translate    # beside transformers on the CPU, in turn
//!
//! The answers are checked before anything is timed.

use std::process::Command;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use qkv::cache::{Cache, Extents};
use qkv::generate::{Generator, Settings};
use qkv::gpu::{DType, Gpu, Recorder};
use qkv::model::{Padded, Source};
use qkv::ops::Choice;
use qkv::translate::Translator;

const SENTENCES: &str = include_str!("sentences.txt");

fn main() {
    let gpu = Gpu::new().expect("a device").untuned();
    let started = Instant::now();
    let translator = Translator::load(&gpu, &Source::Embedded, DType::F32, &mut |_, _| {})
        .expect("the embedded model");
    println!(
        "device: {}; loaded in {:?}",
        gpu.caps().name,
        started.elapsed()
    );
    let settings = Settings {
        beams: 1,
        max_tokens: 64,
        ..translator.settings.clone()
    };
    let sources: Vec<Vec<u32>> = SENTENCES
        .lines()
        .map(|line| {
            translator
                .encode("a sentence", line, Some("fra"))
                .expect("short sentences")
        })
        .collect();
    verify(&translator, &sources, &settings);

    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4))
        .configure_from_args();
    for n in [1, 64] {
        let batch = &sources[..n];
        let tokens = translate(&translator, batch, &settings).1;
        let mut group = criterion.benchmark_group(format!("translate {n}"));
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function("tokens", |bencher| {
            bencher.iter(|| translate(&translator, batch, &settings))
        });
        group.throughput(Throughput::Elements(n as u64));
        group.bench_function("sentences", |bencher| {
            bencher.iter(|| translate(&translator, batch, &settings))
        });
        group.bench_function("first token", |bencher| {
            bencher.iter(|| first_token(&translator, batch, &settings));
        });
    }
    host_time(&translator, &sources[..1]);
    if let Some(python) = std::env::var_os("QKV_HF_PYTHON") {
        beside_transformers(&translator, &sources, &settings, &python);
    }
    criterion.final_summary();
}

/// A batch gives what its sentences give alone, and the everyday one is right.
fn verify(translator: &Translator, sources: &[Vec<u32>], settings: &Settings) {
    let batch = translator
        .translate(sources, settings, &mut |_| {})
        .expect("a translation");
    assert_eq!(batch.translations[0].text, "Qui es-tu ?");
    for (source, translation) in sources.iter().zip(&batch.translations).step_by(9) {
        let alone = translator
            .translate(std::slice::from_ref(source), settings, &mut |_| {})
            .expect("a translation");
        assert_eq!(alone.translations[0].text, translation.text);
    }
}

/// Translates; the number of sentences and of tokens written.
fn translate(translator: &Translator, sources: &[Vec<u32>], settings: &Settings) -> (usize, usize) {
    let batch = translator
        .translate(sources, settings, &mut |_| {})
        .expect("a translation");
    let tokens = batch
        .translations
        .iter()
        .map(|translation| translation.target.tokens.len());
    (batch.translations.len(), tokens.sum())
}

fn first_token(translator: &Translator, sources: &[Vec<u32>], settings: &Settings) {
    let memory = translator
        .model
        .encode(&Padded::new(sources, 0), false)
        .expect("an encoding");
    let mut generator = Generator::new(&translator.model, &memory, settings).expect("a generator");
    generator.next().expect("a step").expect("a step");
}

/// Steps that the host's part is the median of; as many as the model has positions at the most.
const STEPS: usize = 200;

/// The host's part of a decoder step, from an empty encoder to the queue's having the commands, and the
/// whole step's time. The device's own time is not in the former: it starts when that ends.
fn host_time(translator: &Translator, sources: &[Vec<u32>]) {
    let (model, gpu) = (&translator.model, translator.model.gpu());
    let spec = model.spec();
    let memory = model
        .encode(&Padded::new(sources, 0), false)
        .expect("an encoding");
    let extents = Extents {
        layers: spec.decoder.layers,
        rows: 1,
        kv_heads: spec.decoder.heads,
        capacity: STEPS as u32,
        head_dim: spec.width / spec.decoder.heads,
    };
    let cache = Cache::new(gpu, [model.dtype(); 2], extents, false).expect("a cache");
    let ids = gpu
        .upload_u32("ids", &[1], &[translator.settings.start])
        .expect("ids");
    let logits = gpu
        .empty("logits", DType::F32, &[1, spec.target_vocab])
        .expect("logits");
    let mut recorder = Recorder::new(gpu);
    model
        .record_step(&mut recorder, &memory, &cache, &ids, &logits)
        .expect("a step");
    let allowed = vec![u32::MAX; 2 * spec.target_vocab.div_ceil(32) as usize];
    let words = allowed.len() as u32 / 2;
    let allowed = gpu
        .upload_u32("allowed", &[2, words], &allowed)
        .expect("a mask");
    let chosen = gpu
        .empty("chosen", DType::U32, &[1, 1, 2])
        .expect("a token");
    let choice = Choice {
        logits: &logits,
        allowed: &allowed,
        lengths: &cache.lengths,
        chosen: &chosen,
        ids: &ids,
        renormalize: false,
    };
    qkv::ops::choose(&mut recorder, choice).expect("a choice");
    let step = recorder.finish().expect("a step");
    let (mut host, mut whole) = (Vec::new(), Vec::new());
    for _ in 0..STEPS {
        let started = Instant::now();
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        step.encode(&mut encoder);
        let index = gpu.queue().submit([encoder.finish()]);
        host.push(started.elapsed());
        let wait = qkv::wgpu::PollType::Wait {
            submission_index: Some(index),
            timeout: None,
        };
        gpu.device().poll(wait).expect("the device");
        whole.push(started.elapsed());
    }
    host.sort();
    whole.sort();
    println!(
        "decoder step of {} dispatches, {STEPS} steps of a growing text: host median {:?} (least {:?}), \
         host and device median {:?}",
        step.dispatches(),
        host[STEPS / 2],
        host[0],
        whole[STEPS / 2]
    );
}

/// The same model and sentences in Hugging Face transformers on the CPU, in turn with ours.
fn beside_transformers(
    translator: &Translator,
    sources: &[Vec<u32>],
    settings: &Settings,
    python: &std::ffi::OsStr,
) {
    let root = env!("CARGO_MANIFEST_DIR");
    for batch in [1, 64] {
        let mut ratios = Vec::new();
        for _ in 0..3 {
            let started = Instant::now();
            for chunk in sources.chunks(batch) {
                translate(translator, chunk, settings);
            }
            let ours = sources.len() as f64 / started.elapsed().as_secs_f64();
            let output = Command::new(python)
                .arg(format!("{root}/benches/peers/translate_hf.py"))
                .args([
                    "--model",
                    &format!("{root}/models/tatoeba-en-fra-zho"),
                    "--tag",
                    ">>fra<<",
                ])
                .args(["--batch", &batch.to_string(), "--beam", "1", "--runs", "1"])
                .arg(format!("{root}/benches/sentences.txt"))
                .output()
                .expect("python");
            let line = String::from_utf8_lossy(&output.stdout);
            let json: serde_json::Value = serde_json::from_str(line.trim()).unwrap_or_else(|_| {
                panic!(
                    "translate_hf.py: {}",
                    String::from_utf8_lossy(&output.stderr)
                )
            });
            let theirs = json["sentences_per_s"].as_f64().expect("a rate");
            println!(
                "batch {batch}: ours {ours:.1} sentences/s, transformers {theirs:.1}: {:.2} times",
                ours / theirs
            );
            ratios.push(ours / theirs);
        }
        ratios.sort_by(f64::total_cmp);
        println!("batch {batch}: median ratio {:.2}", ratios[1]);
    }
}
