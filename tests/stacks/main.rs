//! Encoder-decoder stacks of every kind that a `Spec` can describe, with random weights, against the
//! oracle's stack; and generation against the same stack's one-shot forward.
#![cfg(feature = "models")]

#[path = "../support/compare.rs"]
mod compare;
#[path = "../support/device.rs"]
mod device;
#[path = "../support/grid/mod.rs"]
mod grid;
mod maker;

use std::collections::BTreeMap;

use compare::{Tolerance, compare_rows, round_to, tolerance};
use device::gpu;
use grid::Random;
use maker::{make, specs};
use qkv::cache::{Cache, Extents};
use qkv::generate::{EarlyStopping, Generator, Sequence, Settings};
use qkv::gpu::{DType, Gpu, Recorder};
use qkv::layers::NormOrder;
use qkv::model::{Memory, Model, Padded, Positions, Source, Spec, Stack};
use qkv::ops::Activation;
use qkv::reference;
use safetensors::tensor::{Dtype, TensorView};

/// Rows of tokens of those lengths.
fn tokens(seed: u64, lengths: &[usize], vocab: u32) -> Vec<Vec<u32>> {
    let mut random = Random::new(seed);
    let mut row = |&n: &usize| (0..n).map(|_| random.below(vocab)).collect();
    lengths.iter().map(&mut row).collect()
}

/// Sources of unequal lengths.
fn sources(spec: &Spec) -> Vec<Vec<u32>> {
    tokens(1, &[5, 9, 2], spec.source_vocab)
}

/// Targets of unequal lengths.
fn targets(spec: &Spec) -> Vec<Vec<u32>> {
    tokens(2, &[7, 4, 8], spec.target_vocab)
}

/// What f32 stacks may be off by: a few layers' sums, one after the other.
fn exact() -> Tolerance {
    tolerance("f32", 64)
}

/// Compares everything that a model gives for a padded batch with the oracle; the answer is the worst
/// ratio of error to tolerance.
fn judge(model: &Model, oracle: &reference::Stack, tol: Tolerance) -> Result<f64, String> {
    let (gpu, spec) = (model.gpu(), model.spec());
    let sources = Padded::new(&sources(spec), 3);
    let targets = Padded::new(&targets(spec), 3);
    let memory = model.encode(&sources, true).unwrap();
    let forward = model.forward(&memory, &targets, true).unwrap();

    let lengths: Vec<usize> = sources.lengths.iter().map(|&n| n as usize).collect();
    let mask = reference::mask_of_lengths(&lengths, sources.len as usize);
    let encoded = oracle.encode(&sources.ids, lengths.len(), Some(&mask));
    let decoded = oracle.decode(&targets.ids, lengths.len(), &encoded.states, Some(&mask));

    let floats = |tensor| gpu.read_floats(tensor).unwrap();
    let mut worst = 0f64;
    for (name, got, want, row) in [
        ("states", &memory.states, &encoded.states, spec.width),
        (
            "logits",
            &forward.logits,
            &decoded.logits,
            spec.target_vocab,
        ),
    ] {
        worst = worst.max(compare_rows(name, &floats(got), want, row as usize, tol)?);
    }
    for (name, got, want, row, layers) in [
        (
            "encoder attention",
            &memory.attentions,
            &encoded.attentions,
            sources.len,
            spec.encoder.layers,
        ),
        (
            "decoder attention",
            &forward.decoder_attentions,
            &decoded.self_attentions,
            targets.len,
            spec.decoder.layers,
        ),
        (
            "cross-attention",
            &forward.cross_attentions,
            &decoded.cross_attentions,
            sources.len,
            spec.decoder.layers,
        ),
    ] {
        assert_eq!([got.len(), want.len()], [layers as usize; 2]);
        for (got, want) in got.iter().zip(want) {
            worst = worst.max(compare_rows(name, &floats(got), want, row as usize, tol)?);
        }
    }
    Ok(worst)
}

#[test]
fn every_kind_of_stack_equals_the_oracle() {
    for (name, spec) in specs() {
        let (model, oracle) = make(gpu(), &spec, DType::F32);
        let worst = judge(&model, &oracle, exact()).unwrap_or_else(|e| panic!("{name}: {e}"));
        println!("{name}: {worst:.3} of the tolerance");
    }
}

#[test]
fn stacks_in_f16_stay_within_the_rounding_of_their_activations() {
    if !gpu().caps().f16 {
        println!("this device has no f16");
        return;
    }
    for (name, spec) in specs() {
        let (model, oracle) = make(gpu(), &spec, DType::F16);
        // Each layer stores a few activations, rounding them by 2^-11 at most; the errors add up and
        // the layers behind pass them on.
        let layers = f64::from(spec.encoder.layers + spec.decoder.layers);
        let rounding = layers * 12.0 * 2f64.powi(-11);
        let tol = Tolerance {
            atol: rounding,
            rtol: rounding,
        };
        let worst = judge(&model, &oracle, tol).unwrap_or_else(|e| panic!("{name}: {e}"));
        println!("{name}: {worst:.3} of the tolerance");
        assert!(judge(&model, &oracle, exact()).is_err(), "it is f16");
    }
}

#[test]
fn another_stack_is_objected_to() {
    let (_, spec) = specs().swap_remove(1);
    let (model, oracle) = make(gpu(), &spec, DType::F32);
    let spoils: [fn(&mut reference::Stack); 5] = [
        |oracle| oracle.norm_place = reference::NormPlace::Pre,
        |oracle| oracle.embedding_scale *= 1.001,
        |oracle| oracle.positions.rotate_left(oracle.d_model),
        |oracle| oracle.decoder[1].feed_forward.activation = reference::Activation::GeluTanh,
        |oracle| oracle.logits_bias = Some(vec![0.01; 31]),
    ];
    for (ix, spoil) in spoils.iter().enumerate() {
        let mut other = oracle.clone();
        spoil(&mut other);
        assert!(judge(&model, &other, exact()).is_err(), "{ix}");
    }
}

/// Logits of every target, [T, V] each, without what the padding gave.
fn logits(model: &Model, memory: &Memory, targets: &[Vec<u32>]) -> Vec<Vec<f64>> {
    let padded = Padded::new(targets, 0);
    let forward = model.forward(memory, &padded, false).unwrap();
    let all = model.gpu().read_floats(&forward.logits).unwrap();
    let vocab = model.spec().target_vocab as usize;
    all.chunks(padded.len as usize * vocab)
        .zip(targets)
        .map(|(row, target)| {
            row[..target.len() * vocab]
                .iter()
                .map(|&x| x.into())
                .collect()
        })
        .collect()
}

fn singles(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

#[test]
fn a_padded_batch_equals_its_singles() {
    for (name, spec) in specs() {
        let (model, _) = make(gpu(), &spec, DType::F32);
        let (sources, targets) = (sources(&spec), targets(&spec));
        let memory = model.encode(&Padded::new(&sources, 0), false).unwrap();
        let batch = logits(&model, &memory, &targets);
        for (ix, want) in batch.iter().enumerate() {
            let memory = model
                .encode(&Padded::new(&sources[ix..=ix], 0), false)
                .unwrap();
            let alone = logits(&model, &memory, &targets[ix..=ix]);
            let vocab = spec.target_vocab as usize;
            compare_rows(name, &singles(&alone[0]), want, vocab, exact()).unwrap();
        }
    }
}

#[test]
fn decoding_step_by_step_equals_the_whole() {
    for (name, spec) in specs() {
        let (model, _) = make(gpu(), &spec, DType::F32);
        let gpu = model.gpu();
        let targets = tokens(3, &[8, 8, 8], spec.target_vocab);
        let sources = Padded::new(&sources(&spec), 0);
        let memory = model.encode(&sources, false).unwrap();
        let whole = logits(&model, &memory, &targets);
        let extents = Extents {
            layers: spec.decoder.layers,
            rows: 3,
            kv_heads: spec.decoder.heads,
            capacity: 11,
            head_dim: spec.width / spec.decoder.heads,
        };
        let mut cache = Cache::new(gpu, [DType::F32; 2], extents, false).unwrap();
        // Nothing may be read of the cache that was not written.
        for block in cache.k.iter_mut().chain(&mut cache.v) {
            let nan = vec![f32::NAN; block.len() as usize];
            *block = gpu
                .upload_floats("cache", DType::F32, block.shape(), &nan)
                .unwrap();
        }
        let vocab = spec.target_vocab as usize;
        let out = gpu
            .empty("logits", DType::F32, &[3, spec.target_vocab])
            .unwrap();
        for t in 0..8 {
            cache.lengths = gpu.upload_u32("lengths", &[3], &[t as u32 + 1; 3]).unwrap();
            let ids: Vec<u32> = targets.iter().map(|target| target[t]).collect();
            let ids = gpu.upload_u32("ids", &[3], &ids).unwrap();
            let mut recorder = Recorder::new(gpu);
            model
                .record_step(&mut recorder, &memory, &cache, &ids, &out)
                .unwrap();
            gpu.run(&recorder.finish().unwrap()).unwrap();
            let got = gpu.read_floats(&out).unwrap();
            let want: Vec<f64> = whole
                .iter()
                .flat_map(|row| row[t * vocab..][..vocab].to_vec())
                .collect();
            compare_rows(&format!("{name}, step {t}"), &got, &want, vocab, exact()).unwrap();
        }
    }
}

const START: u32 = 1;

fn settings(beams: u32) -> Settings {
    Settings {
        beams,
        max_tokens: 10,
        length_penalty: 0.8,
        early_stopping: EarlyStopping::No,
        start: START,
        eos: vec![0],
        forced_bos: None,
        forced_eos: None,
        suppressed: vec![START],
        bad_words: Vec::new(),
        renormalize: false,
        begin_suppressed: vec![0, 2],
    }
}

fn generate(model: &Model, memory: &Memory, settings: &Settings) -> Vec<Sequence> {
    let mut generator = Generator::new(model, memory, settings).unwrap();
    for step in &mut generator {
        step.unwrap();
    }
    assert!(generator.done());
    generator.sequences()
}

/// The log-probabilities of every token before each token of the sequences, by one forward pass.
/// [T, V] each.
fn teacher_forced(model: &Model, memory: &Memory, sequences: &[Sequence]) -> Vec<Vec<f64>> {
    let inputs: Vec<Vec<u32>> = sequences
        .iter()
        .map(|sequence| {
            let (_, before) = sequence.tokens.split_last().expect("a token");
            [&[START], before].concat()
        })
        .collect();
    let vocab = model.spec().target_vocab as usize;
    logits(model, memory, &inputs)
        .iter()
        .map(|row| reference::log_softmax(row, vocab))
        .collect()
}

/// The sum of a sequence's log-probabilities.
fn score(log_probs: &[f64], sequence: &Sequence) -> f64 {
    let vocab = log_probs.len() / sequence.tokens.len();
    let rows = log_probs.chunks(vocab).zip(&sequence.tokens);
    rows.map(|(row, &token)| row[token as usize]).sum()
}

#[test]
fn greedy_decoding_follows_the_forward_pass() {
    for (name, spec) in specs() {
        let (model, _) = make(gpu(), &spec, DType::F32);
        let sources = Padded::new(&sources(&spec), 0);
        let memory = model.encode(&sources, false).unwrap();
        let settings = settings(1);
        let sequences = generate(&model, &memory, &settings);
        let log_probs = teacher_forced(&model, &memory, &sequences);
        for (sequence, log_probs) in sequences.iter().zip(&log_probs) {
            println!("{name}: {:?} {}", sequence.tokens, sequence.score);
            for (step, row) in log_probs.chunks(spec.target_vocab as usize).enumerate() {
                let open = |&token: &usize| {
                    let token = token as u32;
                    !settings.suppressed.contains(&token)
                        && (step > 0 || !settings.begin_suppressed.contains(&token))
                };
                let best = (0..row.len())
                    .filter(open)
                    .max_by(|&a, &b| row[a].total_cmp(&row[b]))
                    .expect("a token");
                assert_eq!(sequence.tokens[step], best as u32, "{name}, step {step}");
            }
            assert!((score(log_probs, sequence) - f64::from(sequence.score)).abs() < 1e-3);
        }
    }
}

#[test]
fn beam_search_scores_what_it_wrote() {
    let mut differ = 0;
    for (name, spec) in specs() {
        let (model, _) = make(gpu(), &spec, DType::F32);
        let sources = sources(&spec);
        let memory = model.encode(&Padded::new(&sources, 0), false).unwrap();
        let greedy = generate(&model, &memory, &settings(1));
        for beams in [2, 4] {
            let settings = settings(beams);
            let sequences = generate(&model, &memory, &settings);
            let log_probs = teacher_forced(&model, &memory, &sequences);
            for (ix, (sequence, log_probs)) in sequences.iter().zip(&log_probs).enumerate() {
                println!("{name}: {:?} {}", sequence.tokens, sequence.score);
                let length = sequence.tokens.len() as f64;
                let want =
                    score(log_probs, sequence) / length.powf(f64::from(settings.length_penalty));
                let got = f64::from(sequence.score);
                assert!((got - want).abs() < 1e-3, "{name}: {got} for {want}");
                differ += usize::from(sequence.tokens != greedy[ix].tokens);
                // Alone the source is written as in the batch.
                let alone = model
                    .encode(&Padded::new(&sources[ix..=ix], 0), false)
                    .unwrap();
                let alone = generate(&model, &alone, &settings);
                assert_eq!(alone[0].tokens, sequence.tokens, "{name}, alone");
            }
        }
    }
    // Else no history would have been taken over.
    println!("{differ} of 24 results are not the greedy ones");
    assert!(differ > 4, "{differ}");
}

#[test]
fn a_step_makes_nothing_and_submits_once() {
    let (_, spec) = specs().swap_remove(0);
    for beams in [1, 4] {
        // An account of its own: the other tests run meanwhile.
        let gpu = gpu().narrowed(gpu().caps().clone());
        let (model, _) = make(&gpu, &spec, DType::F32);
        let sources = Padded::new(&sources(&spec), 0);
        let memory = model.encode(&sources, false).unwrap();
        let settings = settings(beams);
        let mut generator = Generator::new(&model, &memory, &settings).unwrap();
        generator.next().expect("a step").unwrap();
        let mut last = gpu.counters();
        let mut steps = 1;
        for step in generator.by_ref() {
            step.unwrap();
            let now = gpu.counters();
            assert_eq!(now.submits, last.submits + 1, "one submission a step");
            last.submits = now.submits;
            assert_eq!(now, last, "no buffer, bind group or pipeline");
            steps += 1;
        }
        assert_eq!(generator.steps(), steps);
        println!("{beams} beams: {steps} steps, {last:?}");
        assert!(steps > 3);
    }
}
