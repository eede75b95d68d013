//! The scheduler over pages: each request writes what it writes alone, bit for bit, in any company.

use std::collections::BTreeMap;

use qkv::Error;
use qkv::generate::{
    Batch, BatchSettings, CausalGenerator, CausalSettings, Event, RequestId, Sequence,
};
use qkv::gpu::DType;
use qkv::model::{CausalSpec, RopeScaling};
use qkv::ops::Sampling;

use crate::maker::{make, specs};
use crate::steps::wide;
use crate::{generate, gpu, tokens};

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
    // One that is refused, one that runs, one that waits, and all again.
    let refused = batch.add(&[], &limits);
    assert_eq!(batch.cancel(refused).unwrap(), None);
    assert_eq!(batch.cancel(refused).unwrap(), None);
    let cut = batch.cancel(ids[0]).unwrap().unwrap();
    assert_eq!(cut.tokens, wants[0].tokens[..3]);
    assert!(batch.cancel(ids[5]).unwrap().unwrap().tokens.is_empty());
    assert_eq!(batch.cancel(ids[0]).unwrap(), None);
    assert_eq!(batch.cancel(ids[5]).unwrap(), None);
    let mut ended = BTreeMap::new();
    while !batch.is_empty() {
        for event in batch.step().unwrap() {
            match event {
                Event::Token { .. } => {}
                Event::Finished { request, sequence } => {
                    ended.insert(request, sequence.tokens);
                }
                Event::Failed { .. } => panic!("{event:?}"),
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
        // Of keys of a layer, two heads of 8 columns: 20 pages of 16 positions. No weight is larger.
        max_binding: 20 * 16 * 2 * 8 * 4,
        ..caps
    });
    let (model, _) = make(gpu(), &spec, DType::F32);
    let (narrow, _) = make(&small, &spec, DType::F32);
    let settings = BatchSettings {
        pages: u32::MAX,
        page_len: 16,
        types: [DType::F32; 2],
        budget: 32,
        max_sequences: 4,
        cascade: false,
    };
    let pages = |model, settings, positions: &[u32]| {
        let batch = Batch::for_texts(model, settings, positions);
        batch.map(|batch| batch.cache().extents().pages)
    };
    assert_eq!(pages(&model, settings, &[320, 316, 12]).unwrap(), 41);
    assert_eq!(pages(&narrow, settings, &[320, 316, 12]).unwrap(), 20);
    for (model, settings, word) in [
        (
            &narrow,
            settings,
            "is 336: it takes 21 pages of 16, and there may be 20",
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
        let said = pages(model, settings, &[12, 336]).unwrap_err().to_string();
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn a_rotary_base_that_would_grow_is_refused() {
    // Six positions, from which on it grows.
    let (_, spec) = specs().swap_remove(4);
    let (model, _) = make(gpu(), &spec, DType::F32);
    let prompts = tokens(12, &[3, 2, 4], spec.vocab);
    let limits = |n| CausalSettings::greedy(n, vec![]);
    let refused = |prompts: &[Vec<u32>], n| {
        let made = CausalGenerator::new(&model, prompts, &limits(n));
        made.err().map(|e| e.to_string()).unwrap_or_default()
    };
    let said = refused(&prompts, 4);
    assert!(
        said.starts_with("the longest prompt and max_tokens is 7: at most 6"),
        "{said}"
    );
    assert_eq!(refused(&prompts, 3), "");
    let settings = BatchSettings {
        pages: 3,
        page_len: 2,
        types: [DType::F32; 2],
        budget: 8,
        max_sequences: 3,
        cascade: false,
    };
    let more = BatchSettings {
        pages: 4,
        ..settings
    };
    let said = Batch::new(&model, more).err().expect("a refusal");
    assert!(
        said.to_string()
            .starts_with("the positions of all pages is 8: at most 6"),
        "{said}"
    );
    assert!(Batch::for_texts(&model, more, &[7]).is_err());
    // Any number of short texts: some wait until others give their pages back.
    let mut batch = Batch::for_texts(&model, more, &[6, 6, 6]).unwrap();
    assert_eq!(batch.cache().extents().pages, 3);
    let ids: Vec<RequestId> = prompts.iter().map(|p| batch.add(p, &limits(3))).collect();
    let got = answers(batch, 8);
    // As short as they are, they are what a base that does not grow writes.
    let mut steady = spec.clone();
    steady.rope.scaling = RopeScaling::None;
    let (steady, _) = make(gpu(), &steady, DType::F32);
    for (id, want) in ids.iter().zip(generate(&steady, &prompts, &limits(3))) {
        assert_eq!(got.texts[id].tokens, want.tokens);
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
