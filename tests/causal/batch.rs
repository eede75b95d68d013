//! Steps over sequences in pages, and the scheduler over them: beside the contiguous cache, and bit for bit beside
//! themselves in other company.

use std::collections::BTreeMap;

use qkv::Error;
use qkv::cache::{Keep, PagedCache, SequenceId};
use qkv::generate::{
    Batch, BatchSettings, CausalGenerator, CausalSettings, Event, RequestId, Sequence,
};
use qkv::gpu::{DType, Recorder};
use qkv::model::{CausalModel, CausalSpec, PagedStep, RopeScaling};
use qkv::ops::Sampling;

use crate::compare::{Tolerance, compare_rows};
use crate::maker::{make, specs};
use crate::{exact, generate, gpu, in_context, tokens};

/// A pool of nothing but NaN: what was not written may not be read.
fn pool(model: &CausalModel, types: [DType; 2], pages: u32, page_len: u32) -> PagedCache {
    let cache = model.paged_cache(types, pages, page_len).unwrap();
    for layer in 0..model.spec().layers as usize {
        for tensor in cache.layer(layer) {
            let nan = vec![f32::NAN; tensor.len() as usize];
            let (dtype, shape) = (tensor.dtype(), tensor.shape());
            let poison = gpu().upload_floats("nan", dtype, shape, &nan).unwrap();
            gpu().write(tensor, &gpu().read(&poison).unwrap()).unwrap();
        }
    }
    cache
}

/// A step over the next tokens of sequences: the logits of each one's last. `[S, V]`
fn step(model: &CausalModel, cache: &mut PagedCache, new: &[(SequenceId, &[u32])]) -> Vec<f32> {
    step_by(model, cache, new, CausalModel::paged_step).0
}

/// The same by a step of that kind, and whether it is a cascade.
fn step_by(
    model: &CausalModel,
    cache: &mut PagedCache,
    new: &[(SequenceId, &[u32])],
    prepare: impl Fn(&CausalModel, &PagedCache, &[(SequenceId, u32)]) -> qkv::Result<PagedStep>,
) -> (Vec<f32>, bool) {
    let mut recorder = Recorder::new(gpu());
    let mut counts = Vec::new();
    for &(id, tokens) in new {
        cache.append(&mut recorder, id, tokens).unwrap();
        counts.push((id, tokens.len() as u32));
    }
    let step = prepare(model, cache, &counts).unwrap();
    let shape = [new.len() as u32, model.spec().vocab];
    let out = gpu().empty("logits", DType::F32, &shape).unwrap();
    model
        .record_paged_step(&mut recorder, cache, &step, &out)
        .unwrap();
    gpu().run(&recorder.finish().unwrap()).unwrap();
    let lengths = gpu().read_u32(step.lengths()).unwrap();
    let want: Vec<u32> = new.iter().map(|&(id, _)| cache.len(id).unwrap()).collect();
    assert_eq!(lengths, want);
    (gpu().read_floats(&out).unwrap(), step.is_cascade())
}

/// New tokens of each of three sequences by step; none where one takes no part.
const STEPS: [[usize; 3]; 7] = [
    [6, 3, 0],
    [2, 0, 1],
    [1, 5, 1],
    [1, 1, 1],
    [0, 1, 7],
    [4, 1, 1],
    [1, 1, 1],
];

fn compare_steps(
    model: &CausalModel,
    oracle: &qkv::reference::CausalStack,
    types: [DType; 2],
    page_len: u32,
    tol: Tolerance,
) -> Result<f64, String> {
    let vocab = model.spec().vocab as usize;
    // Room for two texts of 17 tokens and one shorter, whatever the pages.
    let pages = 3 * 20u32.div_ceil(page_len);
    let mut cache = pool(model, types, pages, page_len);
    let context = (pages * page_len).min(model.spec().max_positions);
    let oracle = in_context(oracle, model.spec(), context as usize);
    let total = |s: usize| STEPS.iter().map(|step| step[s]).sum();
    let texts = tokens(3, &[0, 1, 2].map(total), model.spec().vocab);
    let want: Vec<Vec<f64>> = texts.iter().map(|text| oracle.forward(text, 1).0).collect();
    let ids = [0, 1, 2].map(|s| cache.start(&texts[s], Keep::default()));
    let mut worst = 0f64;
    let mut ends = [0; 3];
    for counts in STEPS {
        let there: Vec<usize> = (0..3).filter(|&s| counts[s] > 0).collect();
        let new: Vec<(SequenceId, &[u32])> = there
            .iter()
            .map(|&s| (ids[s], &texts[s][ends[s]..][..counts[s]]))
            .collect();
        let got = step(model, &mut cache, &new);
        for (&s, got) in there.iter().zip(got.chunks(vocab)) {
            ends[s] += counts[s];
            let want = &want[s][(ends[s] - 1) * vocab..][..vocab];
            worst = worst.max(compare_rows("logits", got, want, vocab, tol)?);
        }
    }
    Ok(worst)
}

#[test]
fn steps_over_pages_equal_the_whole() {
    for (name, spec) in specs() {
        let (model, oracle) = make(gpu(), &spec, DType::F32);
        for page_len in [1, 5, 16] {
            let worst = compare_steps(&model, &oracle, [DType::F32; 2], page_len, exact())
                .unwrap_or_else(|e| panic!("{name}, pages of {page_len}: {e}"));
            println!("{name}, pages of {page_len}: {worst:.3} of the tolerance");
        }
        let mut other = oracle.clone();
        other.rope.frequencies[0] *= 1.01;
        other.layers[0].window = Some(2);
        let wrong = compare_steps(&model, &other, [DType::F32; 2], 5, exact());
        assert!(wrong.is_err(), "{name}: another stack is objected to");
    }
}

/// Five texts by what they share: most of the first, less of it, nothing; and one that is told as its fork.
fn family(vocab: u32) -> Vec<Vec<u32>> {
    let parts = tokens(41, &[48, 6, 9, 21, 5], vocab);
    let after = |n: usize, tail: &[u32]| [&parts[0][..n], tail].concat();
    vec![
        after(48, &parts[1]),
        after(48, &parts[2]),
        after(20, &parts[3]),
        parts[4].clone(),
        after(48, &parts[1]),
    ]
}

#[test]
fn cascades_equal_the_whole() {
    let (mut cascades, mut steps) = (0, 0);
    for (name, mut spec) in specs() {
        spec.max_positions = spec.max_positions.max(80);
        let (model, oracle) = make(gpu(), &spec, DType::F32);
        let vocab = spec.vocab as usize;
        for page_len in [5, 16] {
            let pages = 5 * 80u32.div_ceil(page_len);
            let mut cache = pool(&model, [DType::F32; 2], pages, page_len);
            let context = (pages * page_len).min(spec.max_positions);
            let oracle = in_context(&oracle, &spec, context as usize);
            let texts = family(spec.vocab);
            let want: Vec<Vec<f64>> = texts.iter().map(|text| oracle.forward(text, 1).0).collect();
            let first = cache.start(&texts[0], Keep::default());
            step(&model, &mut cache, &[(first, &texts[0][..48])]);
            let mut ids = vec![first];
            ids.extend(
                texts[1..4]
                    .iter()
                    .map(|text| cache.start(text, Keep::default())),
            );
            ids.push(cache.fork(first).unwrap());
            let windowed = spec.windows.iter().any(Option::is_some);
            // The last tokens but three in a chunk, then one by one, in another order each time.
            for round in 0..4 {
                let mut order = [3, 1, 4, 0, 2];
                order.rotate_left(round);
                let new: Vec<(SequenceId, &[u32])> = order
                    .iter()
                    .map(|&s| {
                        let from = cache.len(ids[s]).unwrap() as usize;
                        (ids[s], &texts[s][from..texts[s].len() - 3 + round])
                    })
                    .collect();
                let (got, cascade) = step_by(&model, &mut cache, &new, CausalModel::cascade_step);
                assert!(!(windowed && cascade), "{name}: windows read their own");
                steps += 1;
                cascades += u32::from(cascade);
                for (&s, got) in order.iter().zip(got.chunks(vocab)) {
                    let at = cache.len(ids[s]).unwrap() as usize - 1;
                    let want = &want[s][at * vocab..][..vocab];
                    compare_rows("logits", got, want, vocab, exact())
                        .unwrap_or_else(|e| panic!("{name}, pages of {page_len}, {s}: {e}"));
                }
            }
        }
    }
    println!("{cascades} cascades in {steps} steps");
    assert_eq!((cascades, steps), (18, 40));
}

/// A stack whose heads are whole blocks, and texts of up to 80 tokens fit.
fn wide() -> CausalSpec {
    let (_, mut spec) = specs().swap_remove(0);
    spec.heads.head_dim = 32;
    spec.max_positions = 80;
    spec
}

#[test]
fn steps_over_quantized_pages_stay_near_the_whole() {
    let (model, oracle) = make(gpu(), &wide(), DType::F32);
    // Keys and values are rounded by 1 / 254 of a block's largest, in each of two layers.
    let tol = Tolerance {
        atol: 0.1,
        rtol: 0.1,
    };
    for page_len in [1, 5, 16] {
        let types = [DType::Q8_0; 2];
        compare_steps(&model, &oracle, types, page_len, tol).unwrap();
        assert!(
            compare_steps(&model, &oracle, types, page_len, exact()).is_err(),
            "it is rounded"
        );
    }
}

#[test]
fn a_sequences_logits_are_the_same_bits_in_any_company() {
    for (name, spec) in specs() {
        // Its base would grow with the pool.
        if matches!(spec.rope.scaling, RopeScaling::Dynamic { .. }) {
            continue;
        }
        let (model, _) = make(gpu(), &spec, DType::F32);
        let vocab = spec.vocab as usize;
        let texts = tokens(8, &[18, 20, 13, 1, 7, 16], spec.vocab);
        let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        // The first text token by token, alone.
        let mut cache = pool(&model, [DType::F32; 2], 18, 1);
        let id = cache.start(&texts[0], Keep::default());
        let alone: Vec<Vec<u32>> = texts[0]
            .chunks(1)
            .map(|token| bits(&step(&model, &mut cache, &[(id, token)])))
            .collect();
        // Cut otherwise, beside others before and behind it, in pages of other sizes.
        for (page_len, cuts) in [
            (5u32, vec![18]),
            (16, vec![3, 9, 1, 5]),
            (3, vec![1, 16, 1]),
        ] {
            let mut cache = pool(
                &model,
                [DType::F32; 2],
                6 * 20u32.div_ceil(page_len),
                page_len,
            );
            let ids: Vec<SequenceId> = texts
                .iter()
                .map(|text| cache.start(text, Keep::default()))
                .collect();
            let mut end = 0;
            for (ix, cut) in cuts.into_iter().enumerate() {
                let mut new: Vec<(SequenceId, &[u32])> = (1..texts.len())
                    .filter_map(|s| Some((ids[s], texts[s].chunks(4 + s).nth(ix)?)))
                    .collect();
                let at = ix.min(new.len());
                new.insert(at, (ids[0], &texts[0][end..][..cut]));
                end += cut;
                let got = step(&model, &mut cache, &new);
                let got = bits(&got[at * vocab..][..vocab]);
                assert_eq!(got, alone[end - 1], "{name}, pages of {page_len}, to {end}");
            }
        }
    }
}

#[test]
fn long_neighbours_change_no_bit() {
    let (_, mut spec) = specs().swap_remove(0);
    spec.max_positions = 4096;
    let (model, _) = make(gpu(), &spec, DType::F32);
    // Attention takes the keys of the longest in one part, two and three.
    let texts = tokens(12, &[20, 1030, 2060], spec.vocab);
    let vocab = spec.vocab as usize;
    let run = |there: &[usize], chunk: usize| -> Vec<Vec<u32>> {
        let mut cache = pool(&model, [DType::F32; 2], 200, 16);
        let ids: Vec<SequenceId> = there
            .iter()
            .map(|&s| cache.start(&texts[s], Keep::default()))
            .collect();
        let mut last = vec![Vec::new(); there.len()];
        let longest = there.iter().map(|&s| texts[s].len()).max().unwrap();
        // All ends meet in the last step.
        let mut from = 0;
        while from < longest {
            let to = (from + chunk).min(longest);
            let mut rows = Vec::new();
            let mut new: Vec<(SequenceId, &[u32])> = Vec::new();
            for (ix, &s) in there.iter().enumerate() {
                let before = longest - texts[s].len();
                if to > before {
                    rows.push(ix);
                    let own = from.saturating_sub(before)..to - before;
                    new.push((ids[ix], &texts[s][own]));
                }
            }
            let got = step(&model, &mut cache, &new);
            for (&ix, got) in rows.iter().zip(got.chunks(vocab)) {
                last[ix] = got.iter().map(|x| x.to_bits()).collect();
            }
            from = to;
        }
        last
    };
    let all = run(&[0, 1, 2], 687);
    for (s, all) in all.iter().enumerate() {
        assert_eq!(run(&[s], 500)[0], *all, "{s}");
    }
}

/// What a batch says until it is empty: texts, refusals, and its accounts.
struct Answers {
    texts: BTreeMap<RequestId, Sequence>,
    failed: BTreeMap<RequestId, Error>,
    preemptions: u64,
    computed: u64,
}

fn answers(mut batch: Batch, budget: u32) -> Answers {
    let mut heard: BTreeMap<RequestId, Sequence> = BTreeMap::new();
    let (mut texts, mut failed) = (BTreeMap::new(), BTreeMap::new());
    let mut steps = 0;
    while !batch.is_empty() {
        let before = batch.computed();
        for event in batch.step().unwrap() {
            match event {
                Event::Token {
                    request,
                    token,
                    logprob,
                } => {
                    let nothing = Sequence {
                        tokens: Vec::new(),
                        score: 0.0,
                    };
                    let so_far = heard.entry(request).or_insert(nothing);
                    so_far.tokens.push(token);
                    so_far.score += logprob;
                }
                Event::Finished { request, sequence } => {
                    assert_eq!(heard[&request], sequence);
                    assert!(texts.insert(request, sequence).is_none());
                }
                Event::Failed { request, error } => {
                    assert!(failed.insert(request, error).is_none());
                }
            }
        }
        assert!(batch.computed() - before <= u64::from(budget));
        steps += 1;
        assert!(steps < 10_000, "it does not end");
    }
    assert_eq!(batch.cache().used_bytes(), 0, "all pages are given back");
    Answers {
        texts,
        failed,
        preemptions: batch.preemptions(),
        computed: batch.computed(),
    }
}

/// Twelve prompts of 1 to 40 tokens, two of which begin alike.
fn prompts(vocab: u32) -> Vec<Vec<u32>> {
    let mut prompts = tokens(9, &[1, 40, 7, 22, 3, 16, 33, 5, 12, 28, 2, 40], vocab);
    let (first, last) = prompts.split_at_mut(11);
    last[0][..30].copy_from_slice(&first[1][..30]);
    prompts
}

/// Two of the stacks, with room for the prompts: every layer sees all, and windows in every layer.
fn two() -> [(&'static str, CausalSpec); 2] {
    [0, 2].map(|ix| {
        let (name, mut spec) = specs().swap_remove(ix);
        spec.max_positions = 80;
        (name, spec)
    })
}

#[test]
fn batches_write_what_each_prompt_gets_alone() {
    for (name, spec) in two() {
        let (model, _) = make(gpu(), &spec, DType::F32);
        let prompts = prompts(spec.vocab);
        let limits = |ix: usize| CausalSettings::greedy(6 + ix as u32 % 5, vec![ix as u32]);
        let want: Vec<Sequence> = prompts
            .iter()
            .enumerate()
            .map(|(ix, prompt)| {
                generate(&model, std::slice::from_ref(prompt), &limits(ix)).remove(0)
            })
            .collect();
        let mut scores: Vec<Option<u32>> = vec![None; prompts.len()];
        // All the same, whatever the budget, the pages, their number, and who else is there.
        for (budget, page_len, pages, max_sequences, scarce) in [
            (16, 4, 200, 1, false),
            (4, 4, 200, 8, false),
            (16, 5, 13, 12, true),
            (64, 16, 4, 8, true),
            (64, 1, 60, 12, true),
            (64, 16, 100, 12, false),
        ] {
            let what = format!("{name}: budget {budget}, {pages} pages of {page_len}");
            let settings = BatchSettings {
                pages,
                page_len,
                types: [DType::F32; 2],
                budget,
                max_sequences,
                cascade: false,
            };
            let mut batch = Batch::new(&model, settings).unwrap();
            let ids: Vec<RequestId> = prompts
                .iter()
                .enumerate()
                .map(|(ix, prompt)| batch.add(prompt, &limits(ix)))
                .collect();
            let got = answers(batch, budget);
            assert!(got.failed.is_empty(), "{what}: {:?}", got.failed);
            for (ix, id) in ids.iter().enumerate() {
                let text = &got.texts[id];
                assert_eq!(text.tokens, want[ix].tokens, "{what}, prompt {ix}");
                assert!((text.score - want[ix].score).abs() < 1e-3, "{what}");
                // The sum of log-probabilities, bit for bit.
                let bits = text.score.to_bits();
                assert_eq!(*scores[ix].get_or_insert(bits), bits, "{what}, prompt {ix}");
            }
            println!("{what}: {} preemptions", got.preemptions);
            // A window gives pages back, so that they last.
            let windows = spec.windows.iter().all(Option::is_some);
            // Where all run at once, the beginning that two share is computed once.
            let all = prompts.iter().map(Vec::len).sum::<usize>() as u64
                + got
                    .texts
                    .values()
                    .map(|text| text.tokens.len() as u64 - 1)
                    .sum::<u64>();
            let shares = !windows && !scarce && max_sequences == 12;
            let shared = if shares { 30 / page_len * page_len } else { 0 };
            if got.preemptions == 0 && (windows || shares) {
                assert_eq!(got.computed, all - u64::from(shared), "{what}");
            }
            match (scarce, windows) {
                (true, false) => assert!(got.preemptions > 0, "{what}"),
                (false, _) => assert_eq!(got.preemptions, 0, "{what}"),
                (true, true) => {}
            }
        }
    }
}

/// Ways to choose tokens, greedy ones among them.
fn samplings() -> [Sampling; 5] {
    let drawn = Sampling {
        temperature: 1.5,
        ..Sampling::GREEDY
    };
    [
        Sampling::GREEDY,
        drawn,
        Sampling { top_k: 5, ..drawn },
        Sampling {
            top_p: 0.7,
            min_p: 0.01,
            repeat_penalty: 2.0,
            ..drawn
        },
        Sampling {
            repeat_penalty: 3.0,
            ..Sampling::GREEDY
        },
    ]
}

#[test]
fn each_request_is_drawn_by_its_own_rules() {
    for (name, spec) in two() {
        let (model, _) = make(gpu(), &spec, DType::F32);
        let prompts = prompts(spec.vocab);
        let rules = |ix: usize| CausalSettings {
            sampling: samplings()[ix % 5],
            seed: 1 << 40 | ix as u64,
            ..CausalSettings::greedy(8 + ix as u32 % 5, vec![ix as u32])
        };
        let run = |there: &[usize], budget, pages| -> (Vec<Sequence>, u64) {
            let settings = BatchSettings {
                pages,
                page_len: 5,
                types: [DType::F32; 2],
                budget,
                max_sequences: 12,
                cascade: false,
            };
            let mut batch = Batch::new(&model, settings).unwrap();
            let ids: Vec<RequestId> = there
                .iter()
                .map(|&ix| batch.add(&prompts[ix], &rules(ix)))
                .collect();
            let got = answers(batch, budget);
            let texts = ids.iter().map(|id| got.texts[id].clone()).collect();
            (texts, got.preemptions)
        };
        let all: Vec<usize> = (0..prompts.len()).collect();
        let alone: Vec<Sequence> = all
            .iter()
            .map(|&ix| run(&[ix], 64, 20).0.remove(0))
            .collect();
        for (ix, alone) in alone.iter().enumerate() {
            let prompt = std::slice::from_ref(&prompts[ix]);
            let want = generate(&model, prompt, &rules(ix)).remove(0);
            assert_eq!(alone.tokens, want.tokens, "{name}, prompt {ix}");
            assert!((alone.score - want.score).abs() < 1e-3, "{name}");
        }
        let backwards: Vec<usize> = all.iter().rev().copied().collect();
        let mut preemptions = 0;
        for (there, budget, pages) in [(&all, 64, 200), (&all, 9, 13), (&backwards, 16, 200)] {
            let (texts, gave_up) = run(there, budget, pages);
            preemptions += gave_up;
            for (&ix, text) in there.iter().zip(&texts) {
                assert_eq!(text.tokens, alone[ix].tokens, "{name}, prompt {ix}");
                let bits = [text, &alone[ix]].map(|text| text.score.to_bits());
                assert_eq!(bits[0], bits[1], "{name}, prompt {ix}");
            }
        }
        assert!(preemptions > 0 || spec.windows[0].is_some(), "{name}");
        // The rules do something: as many texts differ from greedy ones.
        let greedy = all.iter().filter(|&&ix| {
            let prompt = std::slice::from_ref(&prompts[ix]);
            let plain = CausalSettings {
                sampling: Sampling::GREEDY,
                ..rules(ix)
            };
            generate(&model, prompt, &plain)[0].tokens == alone[ix].tokens
        });
        assert!(greedy.count() <= 5, "{name}");
    }
}

#[test]
fn batches_and_generators_agree_for_every_storage() {
    let (model, _) = make(gpu(), &wide(), DType::F32);
    let prompts = prompts(model.spec().vocab);
    for types in [
        [DType::F32; 2],
        [DType::F16; 2],
        [DType::BF16; 2],
        [DType::Q8_0; 2],
        [DType::Q4_0; 2],
        [DType::Q8_0, DType::F32],
    ] {
        if types.contains(&DType::F16) && !gpu().caps().f16 {
            println!("this device has no f16");
            continue;
        }
        let limits = CausalSettings::greedy(8, vec![]);
        let positions: Vec<u32> = prompts.iter().map(|p| p.len() as u32 + 7).collect();
        let settings = BatchSettings {
            pages: u32::MAX,
            page_len: 4,
            types,
            budget: 32,
            max_sequences: 5,
            cascade: false,
        };
        let mut batch = Batch::for_texts(&model, settings, &positions).unwrap();
        // Room for the five longest of 47, 47, 40, 35 and 29.
        let pages = batch.cache().extents().pages;
        assert_eq!(pages, 12 + 12 + 10 + 9 + 8);
        let ids: Vec<RequestId> = prompts.iter().map(|p| batch.add(p, &limits)).collect();
        let got = answers(batch, 32);
        assert_eq!(got.preemptions, 0);
        for (prompt, id) in prompts.iter().zip(ids) {
            let mut alone = CausalGenerator::with_cache(&model, &[prompt], &limits, types).unwrap();
            let bytes = alone.cache_bytes();
            let row = |dtype: DType| dtype.bytes(&[1, 32]);
            // Two layers of two KV heads.
            let positions = prompt.len() as u64 + 7;
            assert_eq!(bytes, 4 * positions * (row(types[0]) + row(types[1])));
            assert_eq!(alone.by_ref().count(), 8);
            assert_eq!(
                alone.sequences()[0].tokens,
                got.texts[&id].tokens,
                "{types:?}"
            );
        }
    }
}

#[test]
fn a_cancelled_request_leaves_the_others_as_they_are() {
    let (_, spec) = two()[0].clone();
    let (model, _) = make(gpu(), &spec, DType::F32);
    let prompts = prompts(spec.vocab);
    let limits = CausalSettings::greedy(9, vec![]);
    let settings = BatchSettings {
        pages: 40,
        page_len: 5,
        types: [DType::F32; 2],
        budget: 16,
        max_sequences: 3,
        cascade: false,
    };
    let mut batch = Batch::new(&model, settings).unwrap();
    let ids: Vec<RequestId> = prompts[..6].iter().map(|p| batch.add(p, &limits)).collect();
    let wants: Vec<Sequence> = generate(&model, &prompts[..6], &limits);
    let mut written = 0;
    while written < 3 {
        for event in batch.step().unwrap() {
            let Event::Token { request, .. } = event else {
                panic!("{event:?}")
            };
            written += u32::from(request == ids[0]);
        }
    }
    // One that runs, one that waits, and both again.
    let cut = batch.cancel(ids[0]).unwrap().unwrap();
    assert_eq!(cut.tokens, wants[0].tokens[..3]);
    assert!(batch.cancel(ids[5]).unwrap().unwrap().tokens.is_empty());
    assert_eq!(batch.cancel(ids[0]).unwrap(), None);
    assert_eq!(batch.cancel(ids[5]).unwrap(), None);
    let mut ended = BTreeMap::new();
    while !batch.is_empty() {
        for event in batch.step().unwrap() {
            if let Event::Finished { request, sequence } = event {
                ended.insert(request, sequence.tokens);
            }
        }
    }
    assert_eq!(ended.len(), 4);
    for ix in 1..5 {
        assert_eq!(ended[&ids[ix]], wants[ix].tokens);
    }
    assert_eq!(batch.cache().used_bytes(), 0);
}

#[test]
fn what_no_memory_holds_is_refused() {
    let (_, spec) = two()[0].clone();
    let caps = gpu().caps().clone();
    let small = gpu().narrowed(qkv::gpu::Caps {
        // Of keys of a layer, two heads of 8 columns: 20 pages of 4 positions.
        max_binding: 20 * 4 * 2 * 8 * 4,
        ..caps
    });
    let (model, _) = make(gpu(), &spec, DType::F32);
    let (narrow, _) = make(&small, &spec, DType::F32);
    let settings = BatchSettings {
        pages: u32::MAX,
        page_len: 4,
        types: [DType::F32; 2],
        budget: 32,
        max_sequences: 4,
        cascade: false,
    };
    let pages = |model, settings, positions: &[u32]| {
        let batch = Batch::for_texts(model, settings, positions);
        batch.map(|batch| batch.cache().extents().pages)
    };
    assert_eq!(pages(&model, settings, &[80, 79, 3]).unwrap(), 41);
    assert_eq!(pages(&narrow, settings, &[80, 79, 3]).unwrap(), 20);
    for (model, settings, word) in [
        (
            &narrow,
            settings,
            "is 84: it takes 21 pages of 4, and there may be 20",
        ),
        (
            &model,
            BatchSettings {
                pages: 20,
                ..settings
            },
            "there may be 20",
        ),
        (
            &model,
            BatchSettings {
                page_len: 0,
                ..settings
            },
            "page_len is 0",
        ),
    ] {
        let said = pages(model, settings, &[3, 84]).unwrap_err().to_string();
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn what_never_fits_is_refused_alone() {
    let (_, spec) = two()[0].clone();
    let (model, _) = make(gpu(), &spec, DType::F32);
    let settings = BatchSettings {
        pages: 6,
        page_len: 5,
        types: [DType::F32; 2],
        budget: 8,
        max_sequences: 3,
        cascade: false,
    };
    let limits = CausalSettings::greedy;
    let mut strange = limits(2, vec![]);
    strange.sampling.top_p = 0.0;
    let mut batch = Batch::new(&model, settings).unwrap();
    let good = tokens(10, &[12, 25, 4], spec.vocab);
    let mut kept = vec![batch.add(&good[0], &limits(5, vec![]))];
    let refused = [
        (batch.add(&[1; 31], &limits(1, vec![])), "7 pages"),
        (batch.add(&[1; 28], &limits(4, vec![])), "7 pages"),
        (batch.add(&[1; 80], &limits(2, vec![])), "80 positions"),
        (batch.add(&[], &limits(2, vec![])), "empty"),
        (batch.add(&[spec.vocab], &limits(2, vec![])), "vocabulary"),
        (batch.add(&[1], &limits(0, vec![])), "max_tokens"),
        (batch.add(&[1], &limits(2, vec![spec.vocab])), "end token"),
        (batch.add(&[1], &strange), "top_p"),
    ];
    kept.push(batch.add(&good[1], &limits(6, vec![])));
    kept.push(batch.add(&good[2], &limits(5, vec![])));
    let got = answers(batch, settings.budget);
    assert_eq!(got.failed.len(), refused.len());
    for (id, word) in refused {
        let said = got.failed[&id].to_string();
        assert!(said.contains(word), "{said}");
    }
    for (prompt, id) in good.iter().zip(&kept) {
        let n = got.texts[id].tokens.len() as u32;
        let alone = generate(&model, std::slice::from_ref(prompt), &limits(n, vec![]));
        assert_eq!(alone[0].tokens, got.texts[id].tokens);
    }
    for (spoilt, word) in [
        (
            BatchSettings {
                budget: 0,
                ..settings
            },
            "budget",
        ),
        (
            BatchSettings {
                max_sequences: 0,
                ..settings
            },
            "max_sequences",
        ),
        (
            BatchSettings {
                page_len: 0,
                ..settings
            },
            "page_len",
        ),
        (
            BatchSettings {
                pages: 0,
                ..settings
            },
            "pages",
        ),
        (
            BatchSettings {
                types: [DType::Q8_0; 2],
                ..settings
            },
            "storage",
        ),
    ] {
        let said = Batch::new(&model, spoilt)
            .err()
            .expect("a refusal")
            .to_string();
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn a_step_of_a_batch_submits_once() {
    let (_, spec) = two()[0].clone();
    // An account of its own: the other tests run meanwhile.
    let gpu = gpu().narrowed(gpu().caps().clone());
    let (model, _) = make(&gpu, &spec, DType::F32);
    let settings = BatchSettings {
        pages: 12,
        page_len: 4,
        types: [DType::F32; 2],
        budget: 9,
        max_sequences: 5,
        cascade: false,
    };
    let mut batch = Batch::new(&model, settings).unwrap();
    let limits = CausalSettings::greedy(5, vec![]);
    assert!(batch.is_empty() && batch.step().unwrap().is_empty());
    for prompt in tokens(11, &[14, 3, 20, 9], spec.vocab) {
        batch.add(&prompt, &limits);
    }
    while !batch.is_empty() {
        let before = gpu.counters().submits;
        batch.step().unwrap();
        assert_eq!(gpu.counters().submits, before + 1);
    }
}

#[test]
fn what_a_paged_step_cannot_do_is_refused_by_name() {
    let (_, spec) = specs().swap_remove(0);
    let (model, _) = make(gpu(), &spec, DType::F32);
    let mut cache = model.paged_cache([DType::F32; 2], 24, 2).unwrap();
    let mut recorder = Recorder::new(gpu());
    let mut start = |cache: &mut PagedCache, tokens: &[u32]| {
        let id = cache.start(tokens, Keep::default());
        cache.append(&mut recorder, id, tokens).unwrap();
        id
    };
    let good = start(&mut cache, &[1, 2, 3]);
    let (long, strange) = (
        start(&mut cache, &[1; 33]),
        start(&mut cache, &[1, spec.vocab]),
    );
    let gone = start(&mut cache, &[1]);
    cache.remove(gone).unwrap();
    for (new, word) in [
        (vec![], "sequences"),
        (vec![(good, 0)], "new tokens is 0"),
        (vec![(good, 4)], "new tokens is 4"),
        (vec![(good, 1), (good, 1)], "twice"),
        (vec![(long, 1)], "32 positions"),
        (vec![(strange, 1)], "vocabulary"),
        (vec![(gone, 1)], "dropped"),
    ] {
        let said = model.paged_step(&cache, &new).err().expect("a refusal");
        assert!(said.to_string().contains(word), "{said}");
    }
    let step = model.paged_step(&cache, &[(good, 3)]).unwrap();
    let (_, other) = specs().swap_remove(2);
    let (other, _) = make(gpu(), &other, DType::F32);
    let foreign = other.paged_cache([DType::F32; 2], 4, 2).unwrap();
    let out = gpu().empty("logits", DType::F32, &[1, spec.vocab]).unwrap();
    let small = gpu().empty("logits", DType::F32, &[1, 4]).unwrap();
    for (cache, out) in [(&foreign, &out), (&cache, &small)] {
        let mut recorder = Recorder::new(gpu());
        let refused = model.record_paged_step(&mut recorder, cache, &step, out);
        println!("{}", refused.unwrap_err());
    }
}
