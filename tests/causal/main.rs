//! Decoder-only stacks of every kind that a `CausalSpec` can describe, with random weights, against the
//! oracle's stack; steps and generation against the same stack's one-shot forward; the kernels that only they
//! use; and small models of the known families against Hugging Face transformers.
#![cfg(feature = "models")]

mod appends;
mod batch;
#[path = "../support/compare.rs"]
mod compare;
#[path = "../support/device.rs"]
mod device;
mod drafts;
mod gguf;
#[path = "../support/grid/mod.rs"]
mod grid;
mod kernels;
mod maker;
mod steps;
mod transformers;
#[path = "../gguf/writer.rs"]
#[expect(dead_code, reason = "no metadata of these files is an array")]
mod writer;

use compare::{Tolerance, compare_rows, tolerance};
use device::gpu;
use grid::Random;
use maker::{make, rope_of, specs};
use qkv::cache::Cache;
use qkv::generate::{CausalGenerator, CausalSettings, Sequence};
use qkv::gpu::{DType, Recorder, Tensor};
use qkv::model::{CausalModel, CausalSpec, Chunk, Padded, RopeScaling, Wanted};
use qkv::ops::Pairs;
use qkv::reference;

/// Rows of tokens of those lengths.
fn tokens(seed: u64, lengths: &[usize], vocab: u32) -> Vec<Vec<u32>> {
    let mut random = Random::new(seed);
    let mut row = |&n: &usize| (0..n).map(|_| random.below(vocab)).collect();
    lengths.iter().map(&mut row).collect()
}

/// What f32 stacks may be off by: a few layers' sums, one after the other.
fn exact() -> Tolerance {
    tolerance("f32", 64)
}

/// The oracle in a context of that length.
fn in_context(
    oracle: &reference::CausalStack,
    spec: &CausalSpec,
    context: usize,
) -> reference::CausalStack {
    reference::CausalStack {
        rope: rope_of(&spec.rope, context),
        ..oracle.clone()
    }
}

/// Compares everything that a model gives for the texts of a padded batch with the oracle, which sees each
/// text alone; the answer is the worst ratio of error to tolerance.
fn judge(
    model: &CausalModel,
    oracle: &reference::CausalStack,
    tol: Tolerance,
) -> Result<f64, String> {
    let (gpu, spec) = (model.gpu(), model.spec());
    let texts = tokens(1, &[7, 12, 1], spec.vocab);
    let batch = Padded::new(&texts, 3);
    let forward = model.forward(&batch, true).unwrap();
    let floats = |tensor| gpu.read_floats(tensor).unwrap();
    let (logits, len) = (floats(&forward.logits), batch.len as usize);
    let attentions: Vec<Vec<f32>> = forward.attentions.iter().map(floats).collect();
    assert_eq!(attentions.len(), spec.layers as usize);
    let (vocab, heads) = (spec.vocab as usize, spec.heads.heads as usize);
    let mut worst = 0f64;
    for (s, text) in texts.iter().enumerate() {
        let n = text.len();
        let (want, weights) = oracle.forward(text, 1);
        let got = &logits[s * len * vocab..][..n * vocab];
        worst = worst.max(compare_rows("logits", got, &want, vocab, tol)?);
        for (got, want) in attentions.iter().zip(&weights) {
            for head in 0..heads {
                for row in 0..n {
                    let got = &got[((s * heads + head) * len + row) * len..][..len];
                    let mut want = want[(head * n + row) * n..][..n].to_vec();
                    want.resize(len, 0.0);
                    worst = worst.max(compare_rows("attention", got, &want, len, tol)?);
                }
            }
        }
    }
    Ok(worst)
}

#[test]
fn every_kind_of_stack_equals_the_oracle() {
    for (name, spec) in specs() {
        let (model, oracle) = make(gpu(), &spec, DType::F32);
        let oracle = in_context(&oracle, &spec, 12);
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
        let oracle = in_context(&oracle, &spec, 12);
        // Each layer stores a few activations, rounding them by 2^-11 at most; the errors add up and the
        // layers behind pass them on.
        let rounding = f64::from(spec.layers) * 16.0 * 2f64.powi(-11);
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
    judge(&model, &oracle, exact()).unwrap();
    let spoils: [fn(&mut reference::CausalStack); 9] = [
        |oracle| oracle.rope.neighbours = false,
        |oracle| oracle.rope.attention_factor = 1.001,
        |oracle| oracle.rope.frequencies[1] *= 1.001,
        |oracle| oracle.layers[0].window = Some(4),
        |oracle| oracle.layers[1].window = Some(11),
        |oracle| oracle.layers[0].qk_norm = None,
        |oracle| oracle.layers[0].activation = reference::Activation::GeluTanh,
        |oracle| oracle.eps = 1e-4,
        |oracle| oracle.output = None,
    ];
    for (ix, spoil) in spoils.iter().enumerate() {
        let mut other = oracle.clone();
        spoil(&mut other);
        assert!(judge(&model, &other, exact()).is_err(), "{ix}");
    }
}

/// Logits of every text, [T, V] each, without what the padding gave.
fn logits(model: &CausalModel, texts: &[Vec<u32>]) -> Vec<Vec<f64>> {
    let padded = Padded::new(texts, 0);
    let forward = model.forward(&padded, false).unwrap();
    let all = model.gpu().read_floats(&forward.logits).unwrap();
    let vocab = model.spec().vocab as usize;
    let rows = all.chunks(padded.len as usize * vocab).zip(texts);
    rows.map(|(row, text)| {
        row[..text.len() * vocab]
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
        // Where the base grows with the longest text, a batch is one context.
        if matches!(spec.rope.scaling, RopeScaling::Dynamic { .. }) {
            continue;
        }
        let (model, _) = make(gpu(), &spec, DType::F32);
        let texts = tokens(2, &[5, 13, 1, 8], spec.vocab);
        let batch = logits(&model, &texts);
        for (text, want) in texts.iter().zip(&batch) {
            let alone = logits(&model, std::slice::from_ref(text));
            let vocab = spec.vocab as usize;
            compare_rows(name, &singles(&alone[0]), want, vocab, exact()).unwrap();
        }
    }
}

/// A cache of nothing but NaN: what was not written may not be read.
fn empty_cache(model: &CausalModel, sequences: u32, capacity: u32) -> Cache {
    let mut cache = model
        .cache([model.dtype(); 2], sequences, capacity)
        .unwrap();
    for block in cache.k.iter_mut().chain(&mut cache.v) {
        let nan = vec![f32::NAN; block.len() as usize];
        let dtype = block.dtype();
        *block = gpu()
            .upload_floats("cache", dtype, block.shape(), &nan)
            .unwrap();
    }
    cache
}

fn run_step(
    model: &CausalModel,
    cache: &Cache,
    chunk: &Chunk,
    lengths: &[u32],
    out: &Tensor,
) -> Vec<f32> {
    let gpu = model.gpu();
    gpu.write(&cache.lengths, bytemuck::cast_slice(lengths))
        .unwrap();
    let mut recorder = Recorder::new(gpu);
    model.record_step(&mut recorder, cache, chunk, out).unwrap();
    gpu.run(&recorder.finish().unwrap()).unwrap();
    gpu.read_floats(out).unwrap()
}

#[test]
fn chunks_and_single_tokens_equal_the_whole() {
    for (name, spec) in specs() {
        let (model, oracle) = make(gpu(), &spec, DType::F32);
        let vocab = spec.vocab as usize;
        let capacity = 17;
        let oracle = in_context(&oracle, &spec, capacity);
        // New tokens of each sequence by step.
        let steps: [[usize; 3]; 6] = [
            [6, 3, 1],
            [2, 5, 1],
            [1, 1, 1],
            [1, 1, 1],
            [4, 1, 6],
            [1, 1, 1],
        ];
        let total = |s: usize, n: usize| -> usize { steps[..n].iter().map(|step| step[s]).sum() };
        let texts = tokens(3, &[0, 1, 2].map(|s| total(s, 6)), spec.vocab);
        let want: Vec<Vec<f64>> = texts.iter().map(|text| oracle.forward(text, 1).0).collect();
        let cache = empty_cache(&model, 3, capacity as u32);
        let mut worst = 0f64;
        for (ix, step) in steps.iter().enumerate() {
            let starts = [0, 1, 2].map(|s| total(s, ix));
            let ends = [0, 1, 2].map(|s| total(s, ix + 1) as u32);
            let new: Vec<&[u32]> = (0..3).map(|s| &texts[s][starts[s]..][..step[s]]).collect();
            let padded = Padded::new(&new, 0);
            let from = starts.map(|n| n as u32);
            let len = padded.len as usize;
            let name = format!("{name}, step {ix}");
            for wanted in [Wanted::All, Wanted::Last] {
                let chunk = model.chunk(&padded, &from, wanted).unwrap();
                let rows = if wanted == Wanted::All { len } else { 1 };
                let shape = [3, rows as u32, spec.vocab];
                let out = gpu().empty("logits", DType::F32, &shape).unwrap();
                let got = run_step(&model, &cache, &chunk, &ends, &out);
                for s in 0..3 {
                    let own = if wanted == Wanted::All { step[s] } else { 1 };
                    let got = &got[s * rows * vocab..][..own * vocab];
                    let want = &want[s][(starts[s] + step[s] - own) * vocab..][..own * vocab];
                    let ratio = compare_rows(&name, got, want, vocab, exact());
                    worst = worst.max(ratio.unwrap_or_else(|e| panic!("sequence {s}: {e}")));
                }
            }
            if len == 1 {
                // The same again as the steps of generation have it.
                let ids: Vec<u32> = new.iter().map(|row| row[0]).collect();
                let ids = gpu().upload_u32("ids", &[3], &ids).unwrap();
                let out = gpu().empty("logits", DType::F32, &[3, spec.vocab]).unwrap();
                let got = run_step(&model, &cache, &Chunk::one(&ids), &ends, &out);
                for s in 0..3 {
                    let want = &want[s][starts[s] * vocab..][..vocab];
                    let got = &got[s * vocab..][..vocab];
                    compare_rows(&name, got, want, vocab, exact()).unwrap();
                }
            }
        }
        // Behind the last token nothing was written: padding has no place.
        for block in cache.k.iter().chain(&cache.v) {
            let values = gpu().read_floats(block).unwrap();
            let row = spec.heads.head_dim as usize;
            for (at, cell) in values.chunks(row).enumerate() {
                let (position, s) = (at % capacity, at / capacity / spec.heads.kv_heads as usize);
                let written = position < total(s, 6);
                assert!(
                    cell.iter().all(|x| x.is_nan() != written),
                    "{name}: {s} {position}"
                );
            }
        }
        println!("{name}: {worst:.3} of the tolerance");
    }
}

#[test]
fn a_cache_of_other_types_is_written_and_read_as_it_is() {
    if !gpu().caps().f16 {
        println!("this device has no f16");
        return;
    }
    // Keys rounded by 2^-11, values by 2^-8, in each of a few layers.
    let tol = Tolerance {
        atol: 0.05,
        rtol: 0.05,
    };
    for (name, spec) in specs() {
        if spec.heads.head_dim % 2 == 1 {
            continue;
        }
        let (model, oracle) = make(gpu(), &spec, DType::F32);
        let mut cache = empty_cache(&model, 2, 12);
        for (blocks, dtype) in [(&mut cache.k, DType::F16), (&mut cache.v, DType::BF16)] {
            for block in blocks {
                let nan = vec![f32::NAN; block.len() as usize];
                *block = gpu()
                    .upload_floats("cache", dtype, block.shape(), &nan)
                    .unwrap();
            }
        }
        let oracle = in_context(&oracle, &spec, 12);
        let texts = tokens(6, &[9, 5], spec.vocab);
        let vocab = spec.vocab as usize;
        // All but the last token, then that.
        let (first, last): (Vec<&[u32]>, Vec<&[u32]>) = texts
            .iter()
            .map(|text| text.split_at(text.len() - 1))
            .unzip();
        let mut got = Vec::new();
        for (new, starts, ends) in [(first, [0, 0], [8, 4]), (last, [8, 4], [9, 5])] {
            let chunk = model.chunk(&Padded::new(&new, 0), &starts, Wanted::Last);
            let out = gpu().empty("logits", DType::F32, &[2, spec.vocab]);
            got = run_step(&model, &cache, &chunk.unwrap(), &ends, &out.unwrap());
        }
        for (got, text) in got.chunks(vocab).zip(&texts) {
            let (all, _) = oracle.forward(text, 1);
            let want = &all[(text.len() - 1) * vocab..];
            compare_rows(name, got, want, vocab, tol).unwrap();
            assert!(
                compare_rows(name, got, want, vocab, exact()).is_err(),
                "it is rounded"
            );
        }
    }
}

fn generate(model: &CausalModel, prompts: &[Vec<u32>], settings: &CausalSettings) -> Vec<Sequence> {
    let mut generator = CausalGenerator::new(model, prompts, settings).unwrap();
    let mut heard = vec![Vec::new(); prompts.len()];
    for step in &mut generator {
        let tokens = step.unwrap().tokens.into_iter().enumerate();
        tokens.for_each(|(row, token)| heard[row].extend(token));
    }
    assert!(generator.done());
    let sequences = generator.sequences().to_vec();
    let written: Vec<Vec<u32>> = sequences.iter().map(|s| s.tokens.clone()).collect();
    assert_eq!(heard, written);
    sequences
}

#[test]
fn greedy_generation_follows_the_forward_pass_alone_and_in_a_batch() {
    for (name, spec) in specs() {
        if matches!(spec.rope.scaling, RopeScaling::Dynamic { .. }) {
            continue;
        }
        let (model, _) = make(gpu(), &spec, DType::F32);
        let prompts = tokens(4, &[4, 1, 7], spec.vocab);
        let settings = |eos| CausalSettings::greedy(8, eos);
        let free = generate(&model, &prompts, &settings(Vec::new()));
        for (prompt, sequence) in prompts.iter().zip(&free) {
            assert_eq!(sequence.tokens.len(), 8);
            let text = [&prompt[..], &sequence.tokens].concat();
            let all = logits(&model, std::slice::from_ref(&text)).remove(0);
            let mut sum = 0.0;
            for (n, &token) in sequence.tokens.iter().enumerate() {
                let row =
                    &all[(prompt.len() + n - 1) * spec.vocab as usize..][..spec.vocab as usize];
                let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
                assert_eq!(Some(token as usize), best, "{name}, token {n}");
                sum += reference::log_softmax(row, row.len())[token as usize];
            }
            assert!((sum - f64::from(sequence.score)).abs() < 1e-3, "{name}");
            let alone = generate(&model, std::slice::from_ref(prompt), &settings(Vec::new()));
            assert_eq!(alone[0].tokens, sequence.tokens, "{name}, alone");
        }
        // An end token ends the texts that write it, and leaves the others as they are.
        let eos = free[0].tokens[3];
        let ended = generate(&model, &prompts, &settings(vec![eos]));
        for (ended, free) in ended.iter().zip(&free) {
            let end = free.tokens.iter().position(|&token| token == eos);
            let end = end.map_or(free.tokens.len(), |end| end + 1);
            assert_eq!(ended.tokens, free.tokens[..end], "{name}");
        }
    }
}

#[test]
fn a_step_makes_nothing_and_submits_once() {
    let (_, spec) = specs().swap_remove(0);
    // An account of its own: the other tests run meanwhile.
    let gpu = gpu().narrowed(gpu().caps().clone());
    let (model, _) = make(&gpu, &spec, DType::F32);
    let prompts = tokens(5, &[4, 9], spec.vocab);
    let settings = CausalSettings::greedy(9, Vec::new());
    let mut generator = CausalGenerator::new(&model, &prompts, &settings).unwrap();
    let mut last = gpu.counters();
    for step in generator.by_ref() {
        step.unwrap();
        let now = gpu.counters();
        assert_eq!(now.submits, last.submits + 1, "one submission a step");
        last.submits = now.submits;
        // The first step's commands go with it.
        last.bytes = now.bytes;
        assert_eq!(now, last, "no buffer, bind group or pipeline");
    }
    assert_eq!(generator.steps(), 9);
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let (_, spec) = specs().swap_remove(0);
    let (model, _) = make(gpu(), &spec, DType::F32);
    let settings = |max_tokens| CausalSettings::greedy(max_tokens, vec![1]);
    let generator = |prompts: &[Vec<u32>], settings: &CausalSettings| {
        let made = CausalGenerator::new(&model, prompts, settings);
        made.err().expect("a refusal").to_string()
    };
    let bad_end = CausalSettings::greedy(1, vec![37]);
    for (said, word) in [
        (generator(&[], &settings(3)), "input_ids"),
        (
            generator(&[vec![1], vec![]], &settings(3)),
            "0 tokens in row 1",
        ),
        (generator(&[vec![37]], &settings(3)), "token 37"),
        (generator(&[vec![1]], &settings(0)), "max_tokens"),
        (generator(&[vec![1; 30]], &settings(4)), "32 positions"),
        (generator(&[vec![1; 33]], &settings(1)), "32 positions"),
        (generator(&[vec![1]], &bad_end), "end token"),
    ] {
        assert!(said.contains(word), "{said}");
    }
    assert!(CausalGenerator::new(&model, &[vec![1; 30]], &settings(3)).is_ok());

    let refused = |result: qkv::Result<Chunk>| result.err().expect("a refusal").to_string();
    let rows = Padded::new(&[vec![1, 2], vec![3]], 0);
    assert!(refused(model.chunk(&rows, &[0], Wanted::All)).contains("starts"));
    assert!(refused(model.chunk(&rows, &[0, 32], Wanted::All)).contains("33"));
    assert!(refused(model.chunk(&rows, &[31, 0], Wanted::All)).contains("33"));
    assert!(refused(model.chunk(&rows, &[u32::MAX, 0], Wanted::All)).contains("positions"));
    assert!(
        model
            .cache([DType::F32; 2], 1, 33)
            .err()
            .expect("a refusal")
            .to_string()
            .contains("32")
    );
    let floats = [DType::F32; 2];
    assert!(model.cache(floats, 1, 0).is_err() && model.cache(floats, 0, 1).is_err());

    let chunk = model.chunk(&rows, &[0, 0], Wanted::Last).unwrap();
    let out = gpu().empty("logits", DType::F32, &[2, spec.vocab]).unwrap();
    let small = gpu().empty("logits", DType::F32, &[1, spec.vocab]).unwrap();
    let (_, other) = specs().swap_remove(2);
    let (other, _) = make(gpu(), &other, DType::F32);
    let cache = model.cache(floats, 2, 8).unwrap();
    for (cache, out) in [
        (&model.cache(floats, 3, 8).unwrap(), &out),
        (&other.cache(floats, 2, 8).unwrap(), &out),
        (&cache, &small),
    ] {
        let mut recorder = Recorder::new(gpu());
        let refused = model.record_step(&mut recorder, cache, &chunk, out);
        println!("{}", refused.unwrap_err());
    }
}

type Spoil = fn(&mut CausalSpec);

#[test]
fn a_spec_that_no_kernel_honours_is_refused() {
    let spoils: [(Spoil, &str); 12] = [
        (|spec| spec.heads.kv_heads = 4, "KV heads"),
        (|spec| spec.heads.kv_heads = 0, "KV heads"),
        (|spec| spec.heads.head_dim = 577, "head dim"),
        (|spec| spec.windows = vec![None], "windows"),
        (|spec| spec.windows = vec![None, Some(0)], "window"),
        (|spec| spec.norm_eps = f32::NAN, "eps"),
        (|spec| spec.max_positions = 1 << 21, "positions"),
        (|spec| spec.rope.columns = 10, "columns"),
        (|spec| spec.rope.columns = 3, "columns"),
        (|spec| spec.rope.base = 1.0, "base"),
        (
            |spec| spec.rope.scaling = RopeScaling::Linear { factor: 0.5 },
            "factor",
        ),
        (
            |spec| {
                spec.rope.pairs = Pairs::Neighbours;
                spec.rope.scaling = RopeScaling::Llama3 {
                    factor: 8.0,
                    low: 4.0,
                    high: 4.0,
                    original: 8,
                };
            },
            "high_freq_factor",
        ),
    ];
    for (spoil, word) in spoils {
        let (_, mut spec) = specs().swap_remove(0);
        spoil(&mut spec);
        let nowhere = qkv::model::Source::Directory("/nowhere".into());
        let loaded = CausalModel::load_spec(gpu(), &nowhere, &spec, DType::F32, &mut |_, _| {});
        let said = loaded.err().expect("a refusal").to_string();
        assert!(said.contains(word), "{said}");
    }
}
