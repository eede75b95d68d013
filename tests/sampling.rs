//! Sampling: the oracle against transformers' logits processors, the kernel against the oracle, its draws
//! replayed, and generation that a seed repeats whatever stands beside it.
#![cfg(feature = "models")]

#[path = "support/compare.rs"]
mod compare;
#[path = "support/device.rs"]
mod device;
#[path = "support/grid/mod.rs"]
mod grid;

use device::gpu;
use grid::Random;
use qkv::generate::{CausalGenerator, CausalSettings};
use qkv::gpu::{DType, Recorder};
use qkv::model::{CausalModel, Source};
use qkv::ops::{self, Draw, Sampling};
use qkv::reference::{self, Warpers};
use serde_json::Value;

fn golden(path: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(path)
}

#[test]
fn the_oracle_leaves_what_transformers_leaves() {
    let bytes = std::fs::read(golden("sampling/warped.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&bytes).unwrap();
    let mut worst = 0f64;
    for case in &cases {
        let floats = |key: &str| -> Vec<f64> {
            let values = case[key].as_array().unwrap().iter();
            values.map(|x| x.as_f64().unwrap()).collect()
        };
        let one = |key: &str| case[key].as_f64().unwrap();
        let seen: Vec<usize> = floats("seen").iter().map(|&token| token as usize).collect();
        let warpers = Warpers {
            repeat_penalty: one("repeat_penalty"),
            temperature: one("temperature"),
            top_k: one("top_k") as usize,
            top_p: one("top_p"),
            min_p: one("min_p"),
        };
        let got = reference::warp(&floats("logits"), &seen, &warpers);
        for (got, want) in got.iter().zip(floats("probabilities")) {
            assert_eq!(*got == 0.0, want == 0.0, "{warpers:?}");
            worst = worst.max((got - want).abs());
        }
    }
    println!("{} cases, off by {worst:.1e}", cases.len());
    assert!(cases.len() == 12 && worst < 1e-12);
}

/// One draw for each row.
struct Rows {
    vocab: usize,
    logits: Vec<f32>,
    seen: Vec<Vec<usize>>,
    rules: Vec<(Sampling, u64)>,
    lengths: Vec<u32>,
}

struct Drawn {
    /// -1e30 for those dropped. `[R, V]`
    scores: Vec<f32>,
    tokens: Vec<usize>,
    logprobs: Vec<f32>,
    seen: Vec<u32>,
    lengths: Vec<u32>,
    ids: Vec<u32>,
}

fn sample(rows: &Rows, top_k: bool, top_p: bool) -> Drawn {
    let gpu = gpu();
    let (n, vocab) = (rows.lengths.len() as u32, rows.vocab as u32);
    let words = rows.vocab.div_ceil(32);
    let mut bits = vec![0u32; rows.seen.len() * words];
    for (row, seen) in rows.seen.iter().enumerate() {
        seen.iter()
            .for_each(|token| bits[row * words + token / 32] |= 1 << (token % 32));
    }
    let rules = rows.rules.iter().flat_map(|(rule, seed)| rule.rules(*seed));
    let rules: Vec<u32> = rules.collect();
    let logits = gpu
        .upload_floats("logits", DType::F32, &[n, vocab], &rows.logits)
        .unwrap();
    let rules = gpu.upload_u32("rules", &[n, 8], &rules).unwrap();
    let seen = gpu.upload_u32("seen", &[n, words as u32], &bits).unwrap();
    let lengths = gpu.upload_u32("lengths", &[n], &rows.lengths).unwrap();
    let chosen = gpu.empty("chosen", DType::U32, &[n, 1, 2]).unwrap();
    let ids = gpu.empty("ids", DType::U32, &[n]).unwrap();
    let mut recorder = Recorder::new(gpu);
    let draw = Draw {
        logits: &logits,
        rules: &rules,
        seen: &seen,
        lengths: &lengths,
        chosen: &chosen,
        ids: &ids,
        top_k,
        top_p,
    };
    ops::sample(&mut recorder, draw).unwrap();
    gpu.run(&recorder.finish().unwrap()).unwrap();
    let words = |tensor| gpu.read_u32(tensor).unwrap();
    let pairs = words(&chosen);
    Drawn {
        scores: gpu.read_floats(&logits).unwrap(),
        tokens: pairs
            .iter()
            .step_by(2)
            .map(|&token| token as usize)
            .collect(),
        logprobs: pairs[1..]
            .iter()
            .step_by(2)
            .map(|&b| f32::from_bits(b))
            .collect(),
        seen: words(&seen),
        lengths: words(&lengths),
        ids: words(&ids),
    }
}

/// What rows may be drawn by, each alone and together.
fn samplings() -> Vec<Sampling> {
    let plain = Sampling {
        temperature: 1.0,
        ..Sampling::GREEDY
    };
    let mut all = Vec::new();
    for [repeat_penalty, temperature] in [[1.0, 1.0], [1.25, 0.7], [0.8, 2.0]] {
        for top_k in [0, 1, 7, 40, 5000] {
            for top_p in [1.0, 0.9, 0.35, 0.001] {
                for min_p in [0.0, 0.06, 1.0] {
                    all.push(Sampling {
                        repeat_penalty,
                        temperature,
                        top_k,
                        top_p,
                        min_p,
                    });
                }
            }
        }
    }
    all.push(plain);
    all
}

fn rows(seed: u64, vocab: usize, rules: Vec<(Sampling, u64)>) -> Rows {
    let random = &mut Random::new(seed);
    let n = rules.len();
    let spread = 6.0;
    Rows {
        vocab,
        logits: (0..n * vocab)
            .map(|_| (spread * random.float()) as f32)
            .collect(),
        seen: (0..n)
            .map(|_| {
                (0..9)
                    .map(|_| random.below(vocab as u32) as usize)
                    .collect()
            })
            .collect(),
        lengths: (0..n).map(|_| 1 + random.below(4000)).collect(),
        rules,
    }
}

fn oracle(rows: &Rows, row: usize, rule: &Sampling) -> Vec<f64> {
    let logits = &rows.logits[row * rows.vocab..][..rows.vocab];
    let logits: Vec<f64> = logits.iter().map(|&x| x.into()).collect();
    let warpers = Warpers {
        repeat_penalty: rule.repeat_penalty.into(),
        temperature: rule.temperature.into(),
        top_k: rule.top_k as usize,
        top_p: rule.top_p.into(),
        min_p: rule.min_p.into(),
    };
    reference::warp(&logits, &rows.seen[row], &warpers)
}

#[test]
fn what_is_kept_and_drawn_is_the_oracles() {
    let (mut kept, mut near, mut worst, mut unsure) = (0, 0, 0f64, 0);
    let all = samplings();
    for vocab in [1, 3, 255, 257, 1000, 4099] {
        let rules = all
            .iter()
            .zip(900..)
            .map(|(&rule, seed)| (rule, seed << 20));
        let rows = rows(vocab as u64, vocab, rules.collect());
        let drawn = sample(&rows, true, true);
        for (row, rule) in all.iter().enumerate() {
            let want = oracle(&rows, row, rule);
            let scores = &drawn.scores[row * vocab..][..vocab];
            // Softmax of what the kernel left.
            let got: Vec<f64> = scores
                .iter()
                .map(|&x| if x > -1e29 { f64::from(x).exp() } else { 0.0 })
                .collect();
            let sum: f64 = got.iter().sum();
            let differ = got.iter().zip(&want);
            let differ = differ.filter(|(got, want)| (**got == 0.0) != (**want == 0.0));
            let (n, mass) = differ.fold((0, 0.0), |(n, mass), (got, want)| {
                (n + 1, mass + (got / sum).max(*want))
            });
            // A token whose sum is p but for f32's rounding may be kept or not.
            if n > 0 {
                assert!(
                    n == 1 && mass < 1e-2,
                    "{vocab} {rule:?}: {n} tokens, {mass}"
                );
                near += 1;
                continue;
            }
            kept += got.iter().filter(|&&p| p > 0.0).count();
            for (got, want) in got.iter().zip(&want) {
                worst = worst.max((got / sum - want).abs());
            }
            let (seed, length) = (rows.rules[row].1, rows.lengths[row]);
            let (token, distance) = reference::draw(&want, reference::uniform(seed, length));
            match distance > 1e-5 {
                true => assert_eq!(drawn.tokens[row], token, "{vocab} {rule:?}"),
                false => unsure += 1,
            }
            let token = drawn.tokens[row];
            assert!(got[token] > 0.0);
            let logits = &rows.logits[row * vocab..][..vocab];
            let own: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            let logprob = f64::from(logits[token]) - own.ln();
            assert!((f64::from(drawn.logprobs[row]) - logprob).abs() < 1e-5);
            let word = drawn.seen[row * vocab.div_ceil(32) + token / 32];
            assert_ne!(word & 1 << (token % 32), 0);
            assert_eq!(
                (drawn.ids[row], drawn.lengths[row]),
                (token as u32, length + 1)
            );
        }
    }
    let runs = 6 * all.len();
    println!(
        "{runs} rows, {kept} tokens kept, probabilities off by {worst:.1e}; {near} at a bound, {unsure} draws too"
    );
    assert!(worst < 1e-5 && near <= runs / 100 && unsure <= runs / 50);
}

#[test]
fn kernels_without_top_k_or_top_p_do_not_look_at_them() {
    let rule = Sampling {
        repeat_penalty: 1.1,
        temperature: 0.9,
        top_k: 3,
        top_p: 0.2,
        min_p: 0.0,
    };
    for (top_k, top_p) in [(true, true), (true, false), (false, true), (false, false)] {
        let rows = rows(5, 700, vec![(rule, 1)]);
        let drawn = sample(&rows, top_k, top_p);
        let seen = Sampling {
            top_k: if top_k { 3 } else { 0 },
            top_p: if top_p { 0.2 } else { 1.0 },
            ..rule
        };
        let want = oracle(&rows, 0, &seen);
        let want = want.iter().filter(|&&p| p > 0.0).count();
        let got = drawn.scores.iter().filter(|&&x| x > -1e29).count();
        assert_eq!(got, want, "{top_k} {top_p}");
    }
}

#[test]
fn equal_tokens_stay_together_and_temperature_0_takes_the_first_of_the_likeliest() {
    let mut rows = rows(6, 300, vec![(Sampling::GREEDY, 3); 2]);
    rows.rules[1].0 = Sampling {
        temperature: 1.0,
        top_k: 2,
        ..Sampling::GREEDY
    };
    for row in 0..2 {
        for token in [17, 200, 299] {
            rows.logits[row * 300 + token] = 9.0;
        }
        rows.seen[row].clear();
    }
    let drawn = sample(&rows, true, true);
    assert_eq!(drawn.tokens[0], 17);
    for row in 0..2 {
        let left = drawn.scores[row * 300..][..300].iter().enumerate();
        let left: Vec<usize> = left
            .filter(|(_, x)| **x > -1e29)
            .map(|(ix, _)| ix)
            .collect();
        assert_eq!(left, [17, 200, 299]);
    }
    // The penalty comes before the choice.
    rows.seen[0] = vec![17];
    rows.rules[0].0.repeat_penalty = 1.5;
    assert_eq!(sample(&rows, false, false).tokens[0], 200);
}

#[test]
fn logits_that_are_not_finite_are_told() {
    for spoil in [f32::NAN, f32::INFINITY] {
        let rule = Sampling {
            temperature: 1.0,
            top_k: 5,
            top_p: 0.9,
            ..Sampling::GREEDY
        };
        let mut rows = rows(7, 300, vec![(rule, 3); 2]);
        rows.logits[44] = spoil;
        let drawn = sample(&rows, true, true);
        assert!(!drawn.logprobs[0].is_finite(), "{spoil}");
        assert!(drawn.logprobs[1].is_finite() && drawn.tokens[0] < 300);
    }
}

/// The sum of (seen - wanted)^2 / wanted.
fn chi_square(seen: &[f64], wanted: &[f64]) -> f64 {
    let pairs = seen.iter().zip(wanted);
    pairs.map(|(seen, want)| (seen - want).powi(2) / want).sum()
}

#[test]
fn draws_are_even_by_seed_and_by_length() {
    // 63 degrees of freedom: above 110 once in 4,000.
    for (name, of) in [
        ("seeds", (|n| (n, 12)) as fn(u64) -> (u64, u32)),
        ("lengths", |n| (42, n as u32)),
        ("high halves of seeds", |n| (n << 32, 12)),
        ("seeds and lengths together", |n| (n, n as u32)),
    ] {
        let mut bins = vec![0.0; 64];
        for n in 0..65536 {
            let (seed, length) = of(n);
            bins[(reference::uniform(seed, length) * 64.0) as usize] += 1.0;
        }
        let off = chi_square(&bins, &[1024.0; 64]);
        println!("{name}: chi-square {off:.1}");
        assert!(off < 110.0, "{name}");
    }
    // The kernel's draws as often as their probabilities say.
    let rule = Sampling {
        temperature: 4.0,
        top_p: 0.95,
        ..Sampling::GREEDY
    };
    let rows = rows(8, 9, vec![(rule, 0)]);
    let want = oracle(&rows, 0, &rule);
    let n = 4096;
    let many = Rows {
        logits: rows.logits.repeat(n),
        seen: vec![rows.seen[0].clone(); n],
        rules: (0..n as u64).map(|seed| (rule, seed)).collect(),
        lengths: vec![5; n],
        ..rows
    };
    let mut counts = [0.0; 9];
    let tokens = sample(&many, false, true).tokens;
    tokens.iter().for_each(|&token| counts[token] += 1.0);
    let left: Vec<usize> = (0..9).filter(|&token| want[token] > 0.0).collect();
    let counts: Vec<f64> = left.iter().map(|&token| counts[token]).collect();
    let want: Vec<f64> = left.iter().map(|&token| want[token] * n as f64).collect();
    let off = chi_square(&counts, &want);
    println!("{counts:?} of {want:.1?}: chi-square {off:.1}");
    // 8 degrees of freedom at most: above 26 once in 1,000.
    assert!(counts.iter().sum::<f64>() == n as f64 && off < 26.0);
}

fn write(model: &CausalModel, prompts: &[Vec<u32>], settings: &CausalSettings) -> Vec<Vec<u32>> {
    let mut generator = CausalGenerator::new(model, prompts, settings).unwrap();
    generator.by_ref().for_each(|step| drop(step.unwrap()));
    let sequences = generator.sequences().iter();
    sequences.map(|sequence| sequence.tokens.clone()).collect()
}

#[test]
fn a_seed_repeats_a_text_whatever_stands_beside_it() {
    let source = Source::Directory(golden("causal/llama"));
    let model = CausalModel::load(gpu(), &source, DType::F32, &mut |_, _| {}).unwrap();
    let settings = |seed, temperature| CausalSettings {
        sampling: Sampling {
            repeat_penalty: 1.1,
            temperature,
            top_k: 50,
            top_p: 0.95,
            min_p: 0.01,
        },
        seed,
        ..CausalSettings::greedy(16, Vec::new())
    };
    let prompts = [vec![3, 1, 4], vec![1, 5, 9, 2, 6, 5], vec![3, 1, 4]];
    let batch = write(&model, &prompts, &settings(u64::MAX, 1.0));
    assert_eq!(batch, write(&model, &prompts, &settings(u64::MAX, 1.0)));
    // The same prompt draws otherwise in another row.
    assert_ne!(batch[0], batch[2]);
    for (row, seed) in [(0, u64::MAX), (1, 0), (2, 1)] {
        let alone = write(&model, &prompts[row..=row], &settings(seed, 1.0));
        assert_eq!(alone[0], batch[row], "{row}");
    }
    assert_ne!(batch, write(&model, &prompts, &settings(7, 1.0)));
    // Without chance, the seed is nothing.
    let greedy = write(&model, &prompts, &settings(1, 0.0));
    assert_eq!(greedy, write(&model, &prompts, &settings(2, 0.0)));
    assert_eq!(greedy[0], greedy[2]);
    let plain = CausalSettings::greedy(16, Vec::new());
    assert_ne!(greedy, write(&model, &prompts, &plain), "the penalty");
}

#[test]
fn what_cannot_be_drawn_by_is_refused_by_name() {
    let source = Source::Directory(golden("causal/llama"));
    let model = CausalModel::load(gpu(), &source, DType::F32, &mut |_, _| {}).unwrap();
    let good = Sampling::GREEDY;
    for (sampling, said) in [
        (
            Sampling {
                temperature: -1.0,
                ..good
            },
            "temperature is -1: 0, or 0.001 to 1000",
        ),
        (
            Sampling {
                temperature: f32::NAN,
                ..good
            },
            "temperature is NaN: 0, or 0.001 to 1000",
        ),
        (
            Sampling { top_p: 0.0, ..good },
            "top_p is 0: above 0, at most 1",
        ),
        (
            Sampling { top_p: 1.1, ..good },
            "top_p is 1.1: above 0, at most 1",
        ),
        (
            Sampling {
                min_p: -0.1,
                ..good
            },
            "min_p is -0.1: 0 to 1",
        ),
        (
            Sampling {
                repeat_penalty: 0.0,
                ..good
            },
            "repeat_penalty is 0: 0.01 to 100",
        ),
        (
            Sampling {
                repeat_penalty: f32::INFINITY,
                ..good
            },
            "repeat_penalty is inf: 0.01 to 100",
        ),
    ] {
        let settings = CausalSettings {
            sampling,
            ..CausalSettings::greedy(4, Vec::new())
        };
        let made = CausalGenerator::new(&model, &[vec![1]], &settings);
        assert_eq!(made.err().expect("a refusal").to_string(), said);
    }
}
