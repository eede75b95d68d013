//! Steps over sequences in pages: beside the contiguous cache, and bit for bit beside themselves in other company.

use qkv::cache::{Keep, PagedCache, SequenceId};
use qkv::gpu::{DType, Recorder};
use qkv::model::{CausalModel, CausalSpec, PagedStep, RopeScaling};

use crate::compare::{Tolerance, compare_rows};
use crate::maker::{make, specs};
use crate::{exact, gpu, in_context, tokens};

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
pub fn wide() -> CausalSpec {
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
