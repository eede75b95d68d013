//! Appends to the cache, rotated, normed and quantised, beside the oracle.

use qkv::gpu::{DType, Recorder};
use qkv::model::{Rope, RopeScaling};
use qkv::ops::{self, Append, NOWHERE, Pairs, QkNorm, Rotary, Rows};
use qkv::reference::{self, rms_norm, rope_frequencies};

use super::kernels::{noise, run, upload};
use crate::compare::{compare_rows, tolerance};
use crate::gpu;
use crate::maker::rope_of;

/// One append: heads, types, how columns turn, whether queries and keys have a norm.
struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    types: [DType; 3],
    rope: Option<Rope>,
    norm: bool,
    places: bool,
    /// Whether the caches are pools of pages of four positions.
    paged: bool,
}

/// Where the pages of three sequences lie in a pool of eight; page 6 is nobody's, and the last has no place.
const PAGES: [u32; 6] = [3, 0, 7, 5, 1, 99];
const PAGE: usize = 4;

/// Sequence and position of each row of a step; the third is padding, the fifth past the cache's end.
const PLACES: [[u32; 2]; 6] = [[1, 4], [0, 0], [0, NOWHERE], [1, 5], [0, 8], [2, 7]];
const CAPACITY: usize = 8;

/// Half a step between quants, and the rounding of their scale to f16, is what a block may be off by; a whole
/// step at q4_0's short end, where +8 has no quant.
fn compare_blocks(name: &str, got: &[f32], want: &[f64], dtype: DType) -> Result<f64, String> {
    let mut worst = 0f64;
    for (ix, (got, want)) in got.chunks(32).zip(want.chunks(32)).enumerate() {
        let largest = want.iter().fold(0f64, |a, b| a.max(b.abs()));
        let step = match dtype {
            DType::Q8_0 => 0.5 / 127.0,
            _ => 1.0 / 8.0,
        };
        let allowed = largest * (step + 1.0 / 1024.0) + 1e-6;
        let errors = got
            .iter()
            .zip(want)
            .map(|(&got, want)| (f64::from(got) - want).abs());
        let error = errors.fold(0f64, |a, b| if a > b { a } else { b });
        if error > allowed || got.iter().any(|x| x.is_nan()) {
            return Err(format!(
                "{name}: block {ix} is off by {error}, {allowed} allowed"
            ));
        }
        worst = worst.max(error / allowed);
    }
    Ok(worst)
}

/// Runs a case; what is wrong with it, or the worst ratio of error to tolerance.
fn append(case: &Case, spoil: bool) -> Result<f64, String> {
    let Case {
        heads,
        kv_heads,
        dim,
        types: [t, k_type, v_type],
        ..
    } = *case;
    let places: Vec<[u32; 2]> = match case.places {
        true => PLACES.to_vec(),
        false => vec![[0, 3], [1, 0], [2, 7]],
    };
    let rows = places.len();
    let all = heads + 2 * kv_heads;
    let x = noise(1, rows * all * dim, t);
    let gamma = noise(2, 2 * dim, DType::F32);
    let [blocks, block_len] = if case.paged { [8, PAGE] } else { [3, CAPACITY] };
    let cells = blocks * kv_heads * block_len * dim;
    let shape = [blocks as u32, kv_heads as u32, block_len as u32, dim as u32];
    // Blocks of it hold it to the bit.
    let canary = 127.0;
    let caches = [k_type, v_type].map(|dtype| upload(&vec![canary; cells], dtype, &shape));
    let qkv = upload(&x, t, &[rows as u32, (all * dim) as u32]);
    let q = gpu()
        .empty("q", t, &[rows as u32, (heads * dim) as u32])
        .unwrap();
    let flat: Vec<u32> = places.concat();
    let lengths: Vec<u32> = places
        .iter()
        .map(|place| place[1].wrapping_add(1))
        .collect();
    let table = match case.places {
        true => gpu().upload_u32("places", &[rows as u32, 2], &flat),
        false => gpu().upload_u32("lengths", &[rows as u32], &lengths),
    };
    let table = table.unwrap();
    let norm = case.norm.then(|| QkNorm {
        gamma: upload(&gamma, DType::F32, &[2, dim as u32]),
        eps: 1e-4,
    });
    let rotary: Option<Rotary> = case
        .rope
        .as_ref()
        .map(|rope| rope.rotary(gpu(), 0).unwrap());
    let pages = case
        .paged
        .then(|| gpu().upload_u32("pages", &[3, 2], &PAGES).unwrap());
    let step = Append {
        qkv: &qkv,
        heads: heads as u32,
        rows: match case.places {
            true => Rows::Places(&table),
            false => Rows::Lengths(&table),
        },
        k_cache: &caches[0],
        v_cache: &caches[1],
        pages: pages.as_ref(),
        qk_norm: norm.as_ref(),
        rotary: rotary.as_ref(),
        q: (norm.is_some() || rotary.is_some()).then_some(&q),
    };
    run(|recorder| ops::append(recorder, &step).unwrap());

    let rope = case.rope.as_ref().map(|rope| rope_of(rope, 0));
    let (mut want_k, mut want_v) = (vec![canary; cells], vec![canary; cells]);
    let mut want_q = Vec::new();
    for (row, &[sequence, position]) in places.iter().enumerate() {
        for head in 0..all {
            let mut y = x[(row * all + head) * dim..][..dim].to_vec();
            let is_value = head >= heads + kv_heads;
            if case.norm && !is_value {
                let from = if head < heads { 0 } else { dim };
                y = rms_norm(&y, &gamma[from..][..dim], f64::from(1e-4f32));
            }
            if let Some(rope) = rope.as_ref().filter(|_| !is_value) {
                rope.turn(&mut y, position as usize + usize::from(spoil));
            }
            if head < heads {
                // Padding is turned by no known angle.
                let known = position != NOWHERE;
                want_q.extend(if known { y } else { vec![f64::NAN; dim] });
            } else if (position as usize) < CAPACITY {
                let (kv_head, want) = match is_value {
                    true => (head - heads - kv_heads, &mut want_v),
                    false => (head - heads, &mut want_k),
                };
                let (sequence, position) = (sequence as usize, position as usize);
                let page = PAGES[sequence * 2 + position / PAGE] as usize;
                let at = match case.paged {
                    true if page >= blocks => continue,
                    true => (page * kv_heads + kv_head) * PAGE + position % PAGE,
                    false => (sequence * kv_heads + kv_head) * CAPACITY + position,
                };
                want[at * dim..][..dim].copy_from_slice(&y);
            }
        }
    }
    let mut worst = 0f64;
    for (name, cache, want, dtype) in [
        ("keys", &caches[0], &want_k, k_type),
        ("values", &caches[1], &want_v, v_type),
    ] {
        let got = gpu().read_floats(cache).unwrap();
        worst = worst.max(match dtype.is_quantized() {
            true => compare_blocks(name, &got, want, dtype)?,
            false => compare_rows(name, &got, want, dim, tolerance(dtype.name(), dim))?,
        });
    }
    if step.q.is_some() {
        let got = gpu().read_floats(&q).unwrap();
        let width = heads * dim;
        for (got, want) in got.chunks(width).zip(want_q.chunks(width)) {
            match want[0].is_nan() {
                true => assert!(got.iter().all(|x| x.is_finite())),
                false => {
                    let tol = tolerance(t.name(), dim);
                    worst = worst.max(compare_rows("queries", got, want, dim, tol)?);
                }
            }
        }
    }
    Ok(worst)
}

fn rope(base: f64, columns: usize, pairs: Pairs) -> Option<Rope> {
    Some(Rope {
        base,
        columns: columns as u32,
        pairs,
        scaling: RopeScaling::Yarn {
            factor: 2.0,
            original: 32,
            beta_fast: 4.0,
            beta_slow: 1.0,
            truncate: false,
            attention_factor: 1.1,
        },
    })
}

#[test]
fn every_kind_of_append_equals_the_oracle() {
    let (mut runs, mut worst) = (0, 0f64);
    let f16 = gpu().caps().f16;
    for (heads, kv_heads, dim) in [
        (1, 1, 2),
        (6, 2, 8),
        (3, 3, 34),
        (4, 1, 70),
        (2, 2, 96),
        (2, 1, 576),
    ] {
        for types in [
            [DType::F32, DType::Q8_0, DType::Q4_0],
            [DType::F32, DType::Q4_0, DType::F32],
            [DType::F16, DType::F16, DType::Q8_0],
            [DType::F32, DType::F32, DType::F32],
            [DType::F16, DType::F16, DType::F16],
            [DType::F32, DType::F16, DType::BF16],
            [DType::F16, DType::BF16, DType::F32],
        ] {
            let whole = !types.iter().any(|t| t.is_quantized()) || dim % 32 == 0;
            if types.contains(&DType::F16) && !f16 || !whole {
                continue;
            }
            for turn in [
                None,
                rope(100.0, dim, Pairs::Halves),
                rope(100.0, dim, Pairs::Neighbours),
                rope(7.0, dim.div_ceil(4) * 2, Pairs::Halves),
                rope(7.0, dim.div_ceil(4) * 2, Pairs::Neighbours),
            ] {
                for norm in [false, true] {
                    for (places, paged) in
                        [(false, false), (true, false), (false, true), (true, true)]
                    {
                        let case = Case {
                            heads,
                            kv_heads,
                            dim,
                            types,
                            rope: turn.clone(),
                            norm,
                            places,
                            paged,
                        };
                        let what = format!(
                            "{heads} {kv_heads} {dim} {types:?} {turn:?} {norm} {places} {paged}"
                        );
                        let ratio = append(&case, false).unwrap_or_else(|e| panic!("{what}: {e}"));
                        worst = worst.max(ratio);
                        runs += 1;
                        // A quant may hide a turn of few columns by one position.
                        let sharp = !types[1].is_quantized();
                        if turn.is_some() && sharp {
                            assert!(append(&case, true).is_err(), "{what}: another position");
                        }
                    }
                }
            }
        }
    }
    println!("{runs} appends, {worst:.3} of the tolerance");
    assert!(runs >= 100, "{runs}");
}

#[test]
fn angles_are_exact_at_any_position() {
    // One head of ones and zeros gives the sines and cosines themselves.
    let positions: Vec<u32> = (0..20)
        .chain((0..40).map(|n| n * 26_113 + 5))
        .chain([1 << 19, (1 << 20) - 1])
        .collect();
    let dim = 64;
    let rope = Rope {
        base: 1e6,
        columns: dim,
        pairs: Pairs::Halves,
        scaling: RopeScaling::None,
    };
    let rows = positions.len();
    let mut x = vec![0.0; rows * 3 * dim as usize];
    for row in x.chunks_mut(3 * dim as usize) {
        row[..dim as usize / 2].fill(1.0);
    }
    let qkv = upload(&x, DType::F32, &[rows as u32, 3 * dim]);
    let places: Vec<u32> = positions.iter().flat_map(|&p| [0, p]).collect();
    let places = gpu()
        .upload_u32("places", &[rows as u32, 2], &places)
        .unwrap();
    let cache = |name| gpu().empty(name, DType::F32, &[1, 1, 1, dim]).unwrap();
    let (k, v) = (cache("k"), cache("v"));
    let q = gpu().empty("q", DType::F32, &[rows as u32, dim]).unwrap();
    let rotary = rope.rotary(gpu(), 0).unwrap();
    let step = Append {
        qkv: &qkv,
        heads: 1,
        rows: Rows::Places(&places),
        k_cache: &k,
        v_cache: &v,
        pages: None,
        qk_norm: None,
        rotary: Some(&rotary),
        q: Some(&q),
    };
    run(|recorder| ops::append(recorder, &step).unwrap());
    let got = gpu().read_floats(&q).unwrap();
    let mut worst = 0f64;
    let frequencies = rope_frequencies(dim as usize, 1e6, reference::RopeScaling::None);
    for (row, &position) in got.chunks(dim as usize).zip(&positions) {
        for (pair, frequency) in frequencies.iter().enumerate() {
            let (sine, cosine) = (f64::from(position) * frequency).sin_cos();
            let error = (f64::from(row[pair]) - cosine).abs();
            worst = worst.max(error.max((f64::from(row[pair + 32]) - sine).abs()));
        }
    }
    println!("worst error of a sine or cosine: {worst:.1e}");
    assert!(worst < 3e-7, "{worst}");
}

#[test]
fn appends_that_do_not_fit_are_refused() {
    let make = |dtype, shape: &[u32]| gpu().empty("test", dtype, shape).unwrap();
    let f32 = DType::F32;
    let (qkv, q) = (make(f32, &[2, 24]), make(f32, &[2, 12]));
    let (k, lengths) = (make(f32, &[2, 1, 5, 6]), make(DType::U32, &[2]));
    let v = make(f32, &[2, 1, 5, 6]);
    let rotary = rope(10.0, 6, Pairs::Halves)
        .unwrap()
        .rotary(gpu(), 0)
        .unwrap();
    let good = Append {
        qkv: &qkv,
        heads: 2,
        rows: Rows::Lengths(&lengths),
        k_cache: &k,
        v_cache: &v,
        pages: None,
        qk_norm: None,
        rotary: Some(&rotary),
        q: Some(&q),
    };
    let said =
        |step: &Append| ops::append(&mut Recorder::new(gpu()), step).map_err(|e| e.to_string());
    said(&good).unwrap();
    let (short, few) = (make(f32, &[1, 1, 5, 6]), make(DType::U32, &[1]));
    let odd = make(DType::BF16, &[2, 1, 5, 5]);
    let wide = Rotary {
        turns: make(DType::U32, &[4, 2]),
        ..rotary.clone()
    };
    let [turnless, flat_turns] = [&[][..], &[2]].map(|shape| Rotary {
        turns: make(DType::U32, shape),
        ..rotary.clone()
    });
    let (flat, few_queries) = (make(f32, &[60]), make(f32, &[1, 12]));
    for (bad, word) in [
        (Append { q: None, ..good }, "queries"),
        (
            Append {
                rotary: None,
                ..good
            },
            "queries",
        ),
        (
            Append {
                q: Some(&few_queries),
                ..good
            },
            "queries",
        ),
        (
            Append {
                v_cache: &short,
                ..good
            },
            "values' cache",
        ),
        (
            Append {
                k_cache: &flat,
                ..good
            },
            "four extents",
        ),
        (
            Append {
                k_cache: &odd,
                v_cache: &odd,
                ..good
            },
            "bf16 of even heads",
        ),
        (
            Append {
                rows: Rows::Lengths(&few),
                ..good
            },
            "lengths",
        ),
        (
            Append {
                rows: Rows::Places(&lengths),
                ..good
            },
            "places",
        ),
        (
            Append {
                rotary: Some(&wide),
                ..good
            },
            "rotary columns",
        ),
        (
            Append {
                rotary: Some(&turnless),
                ..good
            },
            "the shape of turns",
        ),
        (
            Append {
                rotary: Some(&flat_turns),
                ..good
            },
            "the shape of turns",
        ),
        (
            Append {
                v_cache: &k,
                ..good
            },
            "the values' cache is in another's buffer",
        ),
        (
            Append {
                k_cache: &lengths,
                ..good
            },
            "four extents",
        ),
    ] {
        let said = said(&bad).expect_err(word);
        assert!(said.contains(word), "{said}");
    }
}
