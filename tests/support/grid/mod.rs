//! Attention problems on the device, each beside the oracle's answer.
//!
//! Whatever a kernel may not read is NaN: keys and values at or past `kv_len`, gaps between rows, cells
//! that no history names. Whatever it may not write is a canary, which is checked afterwards.

#![allow(dead_code, reason = "every test file uses its own part of this")]

mod beside;
mod lay;
mod run;

use qkv::attention::{Align, Plan, T5};
use qkv::gpu::{DType, Gpu, Tensor};
use qkv::reference::{self, Attention, AttentionOut, Offset, expand};

use crate::compare::round_to;
use beside::{Spread, T5_BUCKETS, t5_bucket};
use lay::Lay;

/// Numbers that are the same in every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// In -1 .. 1.
    pub fn float(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// Below `n`.
    pub fn below(&mut self, n: u32) -> u32 {
        (self.next() >> 33) as u32 % n
    }
}

/// How q, k, v and out lie in their buffers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Place {
    /// [B, H, L, D].
    Dense,
    /// [B, L, H, D].
    Columns,
    /// Queries, keys and values side by side in one buffer, [B, L, (H + 2 Hk) D].
    Packed,
    /// [B, H, L, D] behind an offset and with so many cells free after each row, head and batch.
    Gaps(u32),
    /// [B, H, D, L]: the columns lie a row apart.
    Transposed,
}

/// A function of the caller's in WGSL that does what an option does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Function {
    /// ALiBi as `score_mod`, its slopes in an extra buffer.
    Alibi,
    /// A window of three keys to either side as `mask_mod`.
    Window,
    /// Documents of nine positions as `mask_mod`, in an extra buffer.
    Documents,
}

/// One problem, still without numbers.
#[derive(Clone, Debug)]
pub struct Case {
    /// Batch rows of Q; of K and V.
    pub batch: [u32; 2],
    /// Query heads; KV heads.
    pub heads: [u32; 2],
    /// Queries; keys. Of ragged sequences, all of them together.
    pub len: [u32; 2],
    /// D; Dv.
    pub dim: [u32; 2],
    pub causal: Option<Align>,
    pub align: Align,
    pub window: [Option<u32>; 2],
    pub kv_len: Option<Vec<u32>>,
    pub q_offset: Option<Vec<i32>>,
    pub prefix: Option<Vec<u32>>,
    /// Queries and keys of each sequence.
    pub ragged: Option<[Vec<u32>; 2]>,
    /// Whether a table of histories says where each key lies.
    pub histories: bool,
    /// Keys of a page, where K and V are pools of pages.
    pub page: Option<u32>,
    pub softcap: Option<f32>,
    /// Along which axes of [B, H, Q, K] they differ.
    pub bias: Option<[bool; 4]>,
    pub mask: Option<[bool; 4]>,
    pub alibi: bool,
    pub t5: Option<T5>,
    pub sinks: bool,
    pub function: Option<Function>,
    pub place: Place,
    /// Storage of q, k, v and out.
    pub types: [DType; 4],
    pub bias_type: DType,
    pub scale: Option<f32>,
    /// The largest magnitude in q.
    pub loud: f64,
    pub batch_invariant: bool,
    /// Products in f16.
    pub f16_math: bool,
}

impl Case {
    pub fn new(batch: [u32; 2], heads: [u32; 2], len: [u32; 2], dim: [u32; 2]) -> Self {
        Case {
            batch,
            heads,
            len,
            dim,
            causal: None,
            align: Align::default(),
            window: [None, None],
            kv_len: None,
            q_offset: None,
            prefix: None,
            ragged: None,
            histories: false,
            page: None,
            softcap: None,
            bias: None,
            mask: None,
            alibi: false,
            t5: None,
            sinks: false,
            function: None,
            place: Place::Dense,
            types: [DType::F32; 4],
            bias_type: DType::F32,
            scale: None,
            loud: 4.0,
            batch_invariant: false,
            f16_math: false,
        }
    }

    fn align(&self) -> Align {
        self.causal.unwrap_or(self.align)
    }
}

/// The name of a storage type in the table of tolerances.
fn storage(dtype: DType) -> &'static str {
    dtype.name()
}

/// The type in which values of a quantised tensor are drawn.
fn float_of(dtype: DType) -> DType {
    match dtype.is_quantized() {
        true => DType::F32,
        false => dtype,
    }
}

/// What blocks make of rows of values.
fn through_blocks(gpu: &Gpu, dtype: DType, width: u32, values: &[f64]) -> Vec<f64> {
    let given: Vec<f32> = values.iter().map(|&x| x as f32).collect();
    let shape = [given.len() as u32 / width, width];
    let stored = gpu.upload_floats("blocks", dtype, &shape, &given).unwrap();
    let got = gpu.read_floats(&stored).unwrap();
    got.into_iter().map(f64::from).collect()
}

const DOCUMENT: u32 = 9;

/// A problem on the device, with the oracle's answer.
pub struct Prepared {
    pub case: Case,
    gpu: Gpu,
    tensors: [Tensor; 3],
    lays: [Lay; 4],
    tables: Tables,
    want: AttentionOut,
    /// The output by a plain computation in the same type, where all four tensors have one 16-bit type.
    plain: Option<Vec<f64>>,
}

/// What stands beside q, k and v, where it is there.
#[derive(Default)]
struct Tables {
    kv_len: Option<Tensor>,
    q_offset: Option<Tensor>,
    prefix: Option<Tensor>,
    cu: Option<[Tensor; 2]>,
    rows: Option<Tensor>,
    pages: Option<Tensor>,
    bias: Option<Tensor>,
    mask: Option<Tensor>,
    alibi: Option<Tensor>,
    t5: Option<Tensor>,
    sinks: Option<Tensor>,
    extra: Option<Tensor>,
}

/// What a run gave: the bits of `out`, of the LSE and of the weights, in their order.
#[derive(Debug, PartialEq)]
pub struct Answer {
    pub plan: Plan,
    pub out: Vec<u32>,
    pub lse: Vec<u32>,
    pub weights: Option<Vec<u32>>,
    /// The errors of `out` over those of a plain computation in the same 16-bit type.
    pub beside_plain: Option<f64>,
}

impl Prepared {
    pub fn new(gpu: &Gpu, case: &Case, seed: u64) -> Self {
        let case = case.clone();
        let mut random = Random::new(seed);
        let ([batch, kv_batch], [heads, kv_heads]) = (case.batch, case.heads);
        let ([q_len, k_len], [d, dv]) = (case.len, case.dim);
        let stored_batch = if case.ragged.is_some() { 1 } else { batch };
        // Batch rows of K and V and keys in each, as they lie; of a pool, its pages, two of them nobody's.
        let [stored_kv_batch, stored_k_len] = match (case.page, &case.ragged) {
            (Some(page), _) => [kv_batch * (k_len / page) + 2, page],
            (None, Some(_)) => [1, k_len],
            (None, None) => [kv_batch, k_len],
        };
        let mut pages: Vec<u32> = (0..stored_kv_batch).collect();
        for ix in (1..pages.len()).rev() {
            pages.swap(ix, random.below(ix as u32 + 1) as usize);
        }
        let starts = |lens: &[u32]| -> Vec<u32> {
            let mut at = 0;
            let ends = lens.iter().map(|&n| {
                at += n;
                at
            });
            std::iter::once(0).chain(ends).collect()
        };
        let cu = case.ragged.as_ref().map(|[q, k]| [starts(q), starts(k)]);
        let kv_len: Vec<u32> = match (&case.ragged, &case.kv_len) {
            (Some([_, k]), _) => k.clone(),
            (None, Some(lens)) => lens.clone(),
            (None, None) => vec![k_len; kv_batch as usize],
        };

        // Which batch row of K and V holds key j of batch row `kb`; what lies past the end is no row.
        let mut rows = Vec::new();
        for kb in 0..kv_batch {
            for j in 0..k_len {
                rows.push(match (case.histories, j < kv_len[kb as usize]) {
                    (true, true) => random.below(kv_batch),
                    (true, false) => u32::MAX,
                    (false, _) => kb,
                });
            }
        }
        let share = batch / kv_batch;
        let q_of = |b: u32| match &case.ragged {
            Some([q, _]) => q[b as usize],
            None => q_len,
        };
        // The stored row of a query, and of a key.
        let q_row = |b: u32, h: u32, i: u32| match &cu {
            Some([q, _]) => h * q_len + q[b as usize] + i,
            None => (b * heads + h) * q_len + i,
        };
        let k_row = |kb: u32, h: u32, j: u32| match (case.page, &cu) {
            (Some(page), _) => {
                let place = pages[(kb * (k_len / page) + j / page) as usize];
                (place * kv_heads + h) * page + j % page
            }
            (None, Some([_, k])) => h * k_len + k[kb as usize] + j,
            (None, None) => (rows[(kb * k_len + j) as usize] * kv_heads + h) * k_len + j,
        };

        let mut numbers = |n: u32, magnitude: f64, dtype: DType| -> Vec<f64> {
            (0..n)
                .map(|_| round_to(storage(dtype), magnitude * random.float()))
                .collect()
        };
        let [q_type, k_type, v_type, out_type] = case.types;
        let q = numbers(stored_batch * heads * q_len * d, case.loud, q_type);
        let stored_keys = stored_kv_batch * kv_heads * stored_k_len;
        let mut k = numbers(stored_keys * d, 1.0, float_of(k_type));
        let mut v = numbers(stored_keys * dv, 1.0, float_of(v_type));
        for (dtype, width, values) in [(k_type, d, &mut k), (v_type, dv, &mut v)] {
            if dtype.is_quantized() {
                *values = through_blocks(gpu, dtype, width, values);
            }
        }
        let slopes = case.alibi || case.function == Some(Function::Alibi);
        let slopes = slopes.then(|| numbers(heads, 0.5, DType::F32));
        let sinks = case.sinks.then(|| numbers(heads, 2.0, DType::F32));
        let table = case
            .t5
            .map(|_| numbers(T5_BUCKETS * heads, 2.0, DType::F32));
        let extents = [batch, heads, q_len, k_len];
        let bias = case.bias.map(|axes| {
            let mut values = numbers(extents.iter().product::<u32>() + 1, 2.0, case.bias_type);
            // Some of it masks.
            values
                .iter_mut()
                .step_by(11)
                .for_each(|x| *x = f64::NEG_INFINITY);
            Spread::new(extents, axes, |_| values.pop().expect("a value each"))
        });
        let mask = case.mask.map(|axes| {
            let mut values = numbers(extents.iter().product::<u32>() + 1, 1.0, DType::F32);
            let mut value = || values.pop().expect("a value each");
            // Key 1 is nobody's, and a stretch of keys neither: whole tiles of it.
            Spread::new(extents, axes, |j| {
                f64::from(value() > -0.5 && j != 1 && !(40..110).contains(&j))
            })
        });

        let stored_rows = (stored_batch * heads * q_len) as usize;
        let cells = stored_rows * k_len as usize;
        let mut want = AttentionOut {
            out: vec![0.0; stored_rows * dv as usize],
            lse: vec![0.0; stored_rows],
            weights: vec![0.0; cells],
            raw: vec![f64::NEG_INFINITY; cells],
            softcapped: vec![f64::NEG_INFINITY; cells],
            biased: vec![f64::NEG_INFINITY; cells],
        };
        let mut seen = vec![false; stored_keys as usize];
        let same_type = case.types == [out_type; 4] && out_type.size() == 2;
        let mut plain = same_type.then(|| want.out.clone());
        for b in 0..batch {
            let (kb, n) = (b / share, q_of(b));
            let length = kv_len[kb as usize];
            let mut own_q = Vec::new();
            for h in 0..heads {
                for i in 0..n {
                    own_q.extend_from_slice(row(&q, q_row(b, h, i), d));
                }
            }
            let (mut own_k, mut own_v) = (Vec::new(), Vec::new());
            for h in 0..kv_heads {
                for j in 0..length {
                    own_k.extend_from_slice(row(&k, k_row(kb, h, j), d));
                    own_v.extend_from_slice(row(&v, k_row(kb, h, j), dv));
                }
            }
            let sizes = |of: [u32; 4]| of.map(|n| n as usize);
            let mut problem = Attention::new(
                sizes([1, heads, n, d]),
                sizes([1, kv_heads, length, dv]),
                &own_q,
                &own_k,
                &own_v,
            );
            let offset = match (&case.q_offset, case.align()) {
                (Some(offsets), _) => i64::from(offsets[b as usize]),
                (None, Align::TopLeft) => 0,
                (None, Align::BottomRight) => i64::from(length) - i64::from(n),
            };
            let offsets = [offset];
            problem.offset = Offset::PerRow(&offsets);
            problem.scale = f64::from(case.scale.unwrap_or(1.0 / (d as f32).sqrt()));
            problem.softcap = case.softcap.map(f64::from);
            // The oracle's causal mask and window; with a prefix, a mask by the definition.
            let prefix = case.prefix.as_ref().map_or(0, |prefix| prefix[b as usize]);
            let side = |bound: Option<u32>| bound.map_or(-1, i64::from);
            let window = (side(case.window[0]), side(case.window[1]));
            let mut range = None;
            match prefix {
                0 => (problem.causal, problem.window) = (case.causal.is_some(), window),
                _ => range = Some((case.causal.is_some(), window)),
            }
            let in_range = |i: usize, j: usize| {
                range.is_none_or(|(causal, (left, right))| {
                    let distance = j as i64 - (i as i64 + offset);
                    (j < prefix as usize)
                        || ((!causal || distance <= 0)
                            && (left < 0 || distance >= -left)
                            && (right < 0 || distance <= right))
                })
            };
            let four = sizes([1, heads, n, length]);
            let indices = |h: usize, i: usize, j: usize| [b, h as u32, i as u32, j as u32];
            let allowed = expand(four, |_, h, i, j| {
                let distance = i.abs_diff(j) as u32;
                let by_function = match case.function {
                    Some(Function::Window) => distance <= 3,
                    Some(Function::Documents) => i as u32 / DOCUMENT == j as u32 / DOCUMENT,
                    _ => true,
                };
                let by_mask = mask
                    .as_ref()
                    .is_none_or(|mask| mask.at(indices(h, i, j)) != 0.0);
                by_function && by_mask && in_range(i, j)
            });
            problem.mask = Some(&allowed);
            let added = expand(four, |_, h, i, j| {
                let own = bias.as_ref().map_or(0.0, |bias| bias.at(indices(h, i, j)));
                let relative = case.t5.map_or(0.0, |t5| {
                    let bucket = t5_bucket(t5, j as i64 - (i as i64 + offset));
                    table.as_ref().expect("a table")[bucket * heads as usize + h]
                });
                own + relative
            });
            problem.bias = Some(&added);
            problem.alibi = slopes.as_deref();
            problem.sinks = sinks.as_deref();
            let got = reference::attention(&problem);
            let got_plain = same_type
                .then(|| reference::attention_eager(&problem, |x| round_to(storage(out_type), x)));
            for h in 0..heads {
                for i in 0..n {
                    let (from, to) = (h * n + i, q_row(b, h, i));
                    let copy = |from_all: &[f64], all: &mut [f64], n: u32, width: u32| {
                        let at = (to * width) as usize;
                        all[at..at + n as usize].copy_from_slice(row(from_all, from, n));
                    };
                    copy(&got.out, &mut want.out, dv, dv);
                    if let (Some(got), Some(plain)) = (&got_plain, &mut plain) {
                        copy(got, plain, dv, dv);
                    }
                    copy(&got.lse, &mut want.lse, 1, 1);
                    copy(&got.weights, &mut want.weights, length, k_len);
                    copy(&got.raw, &mut want.raw, length, k_len);
                    copy(&got.softcapped, &mut want.softcapped, length, k_len);
                    copy(&got.biased, &mut want.biased, length, k_len);
                    for (j, score) in (0..).zip(row(&got.biased, from, length)) {
                        let key = k_row(kb, h / (heads / kv_heads), j) as usize;
                        seen[key] |= *score > f64::NEG_INFINITY;
                    }
                }
            }
        }
        // Keys and values that nobody sees are NaN.
        for (key, _) in seen.iter().enumerate().filter(|&(_, &seen)| !seen) {
            k[key * d as usize..][..d as usize].fill(f64::NAN);
            v[key * dv as usize..][..dv as usize].fill(f64::NAN);
        }

        let mut lays = [
            [stored_batch, heads, q_len, d],
            [stored_kv_batch, kv_heads, stored_k_len, d],
            [stored_kv_batch, kv_heads, stored_k_len, dv],
            [stored_batch, heads, q_len, dv],
        ]
        .map(|extents| Lay::new(case.place, extents));
        if case.place == Place::Packed {
            assert!(
                batch == kv_batch
                    && q_len == k_len
                    && d == dv
                    && q_type == k_type
                    && k_type == v_type
            );
            let width = (heads + 2 * kv_heads) * d;
            let columns = [0, heads * d, (heads + kv_heads) * d];
            for (lay, column) in lays.iter_mut().zip(columns) {
                lay.offset = column;
                lay.strides = [q_len * width, d, width, 1];
                lay.cells = batch * q_len * width;
            }
        }
        let upload = |lays: &[Lay], values: &[&[f64]], dtype: DType| -> Tensor {
            if dtype.is_quantized() {
                assert_eq!(case.place, Place::Dense);
                let values: Vec<f32> = values[0].iter().map(|&x| x as f32).collect();
                return gpu
                    .upload_floats("input", dtype, &lays[0].extents, &values)
                    .unwrap();
            }
            let mut cells = vec![f32::NAN; lays[0].cells as usize];
            for (lay, values) in lays.iter().zip(values) {
                lay.put(&mut cells, values);
            }
            gpu.upload_floats("input", dtype, &[cells.len() as u32], &cells)
                .unwrap()
        };
        let tensors = match case.place {
            Place::Packed => {
                let all = upload(&lays[..3], &[&q, &k, &v], q_type);
                [all.clone(), all.clone(), all]
            }
            _ => [
                upload(&lays[..1], &[&q], q_type),
                upload(&lays[1..2], &[&k], k_type),
                upload(&lays[2..3], &[&v], v_type),
            ],
        };
        assert!(out_type.is_float());
        let floats = |values: &[f64], shape: &[u32], dtype: DType| {
            let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
            gpu.upload_floats("table", dtype, shape, &values).unwrap()
        };
        let integers = |values: &[u32]| {
            gpu.upload_u32("table", &[values.len() as u32], values)
                .unwrap()
        };
        let slopes = slopes.map(|slopes| floats(&slopes, &[heads], DType::F32));
        let by_function = case.function == Some(Function::Alibi);
        let tables = Tables {
            kv_len: match (case.page, &case.ragged) {
                (Some(_), Some([_, k])) => Some(integers(k)),
                _ => case.kv_len.as_ref().map(|lens| integers(lens)),
            },
            pages: case.page.map(|page| {
                let m = k_len / page;
                // What lies past the end of a batch row is nobody's to name.
                let named = pages.iter().zip(0..kv_batch * m).map(|(&n, at)| {
                    match at % m * page < kv_len[(at / m) as usize] {
                        true => n,
                        false => u32::MAX,
                    }
                });
                let named: Vec<u32> = named.collect();
                gpu.upload_u32("pages", &[kv_batch, m], &named).unwrap()
            }),
            q_offset: case.q_offset.as_ref().map(|offsets| {
                let bytes = bytemuck::cast_slice(offsets);
                gpu.upload("q_offset", DType::I32, &[offsets.len() as u32], bytes)
                    .unwrap()
            }),
            prefix: case.prefix.as_ref().map(|prefix| integers(prefix)),
            cu: cu.as_ref().map(|cu| [integers(&cu[0]), integers(&cu[1])]),
            rows: case
                .histories
                .then(|| gpu.upload_u32("rows", &[kv_batch, k_len], &rows).unwrap()),
            bias: bias.map(|bias| floats(&bias.values, &bias.shape, case.bias_type)),
            mask: mask.map(|mask| {
                // Any byte but zero is true.
                let bytes: Vec<u8> = mask
                    .values
                    .iter()
                    .map(|&x| if x != 0.0 { 255 } else { 0 })
                    .collect();
                gpu.upload("mask", DType::Bool, &mask.shape, &bytes)
                    .unwrap()
            }),
            t5: table.map(|table| floats(&table, &[T5_BUCKETS, heads], DType::F32)),
            sinks: sinks.map(|sinks| floats(&sinks, &[heads], DType::F32)),
            extra: match case.function {
                Some(Function::Alibi) => slopes.clone(),
                Some(Function::Documents) => {
                    let documents: Vec<u32> = (0..q_len.max(k_len)).map(|i| i / DOCUMENT).collect();
                    Some(integers(&documents))
                }
                _ => None,
            },
            alibi: slopes.filter(|_| !by_function),
        };
        Prepared {
            gpu: gpu.clone(),
            tensors,
            lays,
            tables,
            want,
            plain,
            case,
        }
    }
}

fn row(values: &[f64], row: u32, width: u32) -> &[f64] {
    &values[(row * width) as usize..][..width as usize]
}
