//! Attention problems on the device, each beside the oracle's answer.
//!
//! Whatever a kernel may not read is NaN: keys and values at or past `kv_len`, gaps between rows, cells
//! that no history names. Whatever it may not write is a canary, which is checked afterwards.

#![allow(dead_code, reason = "every test file uses its own part of this")]

use std::sync::Arc;

use qkv::attention::{Align, Options, Plan, Route, Stage, T5, Tensors, View, record};
use qkv::gpu::{DType, Gpu, Recorder, Tensor};
use qkv::reference::{self, Attention, AttentionOut, Offset, expand};

use crate::compare::{
    Canary, NAN_16, NAN_32, Tolerance, compare_rows, round_to, tolerance as of_storage,
};

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

const DOCUMENT: u32 = 9;
const T5_BUCKETS: u32 = 8;

/// Where the elements of one tensor lie.
#[derive(Clone, Copy)]
struct Lay {
    extents: [u32; 4],
    offset: u32,
    strides: [u32; 4],
    /// Cells of the buffer.
    cells: u32,
}

impl Lay {
    fn new(place: Place, extents: [u32; 4]) -> Lay {
        let [b, h, l, d] = extents;
        let (offset, strides) = match place {
            Place::Dense => (0, [h * l * d, l * d, d, 1]),
            Place::Columns | Place::Packed => (0, [l * h * d, d, h * d, 1]),
            Place::Gaps(n) => {
                let row = d + n;
                let head = l * row + n;
                (2 * n, [h * head + n, head, row, 1])
            }
            Place::Transposed => (0, [h * l * d, l * d, 1, l]),
        };
        // A tail, so that there is something to overwrite behind the last row.
        let cells = offset + b * strides[0] + 16;
        Lay {
            extents,
            offset,
            strides,
            cells,
        }
    }

    /// The first cell of every row, in the order of [B, H, L].
    fn rows(&self) -> impl Iterator<Item = usize> {
        let Lay {
            extents: [b, h, l, _],
            offset,
            strides: [sb, sh, sl, _],
            ..
        } = *self;
        (0..b).flat_map(move |b| {
            (0..h).flat_map(move |h| {
                (0..l).map(move |i| (offset + b * sb + h * sh + i * sl) as usize)
            })
        })
    }

    /// Writes dense values to their cells.
    fn put(&self, cells: &mut [f32], values: &[f64]) {
        let (d, step) = (self.extents[3] as usize, self.strides[3] as usize);
        for (at, row) in self.rows().zip(values.chunks(d)) {
            for (ix, &value) in row.iter().enumerate() {
                cells[at + ix * step] = value as f32;
            }
        }
    }

    fn view<'t>(&self, tensor: &'t Tensor) -> View<'t> {
        View::strided(tensor, self.extents, self.offset, self.strides)
            .expect("a view in its buffer")
    }

    /// Takes the rows out of what was read back. An error where a cell outside them was written.
    fn take<T: Copy + PartialEq + std::fmt::LowerHex>(
        &self,
        canary: Canary<T>,
        mut cells: Vec<T>,
    ) -> Result<Vec<T>, String> {
        let (d, step) = (self.extents[3] as usize, self.strides[3] as usize);
        let mut values = Vec::new();
        for at in self.rows() {
            for ix in 0..d {
                values.push(std::mem::replace(&mut cells[at + ix * step], canary.0));
            }
        }
        canary.untouched_outside("out", &cells, 0..0)?;
        Ok(values)
    }
}

/// A problem on the device, with the oracle's answer.
pub struct Prepared {
    pub case: Case,
    gpu: Gpu,
    tensors: [Tensor; 3],
    lays: [Lay; 4],
    tables: Tables,
    want: AttentionOut,
}

/// What stands beside q, k and v, where it is there.
#[derive(Default)]
struct Tables {
    kv_len: Option<Tensor>,
    q_offset: Option<Tensor>,
    prefix: Option<Tensor>,
    cu: Option<[Tensor; 2]>,
    rows: Option<Tensor>,
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
}

/// T5's bucket of a key `distance` after the query, by the definition.
fn t5_bucket(t5: T5, distance: i64) -> usize {
    let half = if t5.bidirectional {
        T5_BUCKETS / 2
    } else {
        T5_BUCKETS
    } as i64;
    let (side, n) = match (t5.bidirectional, distance > 0) {
        (true, true) => (half, distance),
        (true, false) => (0, -distance),
        (false, _) => (0, (-distance).max(0)),
    };
    let exact = half / 2;
    if n < exact {
        return (side + n) as usize;
    }
    let far = (n as f64 / exact as f64).ln() / (t5.max_distance as f64 / exact as f64).ln();
    let bucket = exact + (far * (half - exact) as f64 + 1e-9).floor() as i64;
    (side + bucket.min(half - 1)) as usize
}

/// An array `[B, H, Q, K]` that is kept only along some axes.
struct Spread {
    shape: [u32; 4],
    values: Vec<f64>,
}

impl Spread {
    fn new(extents: [u32; 4], axes: [bool; 4], mut value: impl FnMut(u32) -> f64) -> Self {
        let mut shape = extents;
        for (n, differs) in shape.iter_mut().zip(axes) {
            *n = if differs { *n } else { 1 };
        }
        // The last axis' own index, so that whole columns can be set.
        let values = (0..shape.iter().product()).map(|at| value(at % shape[3]));
        Spread {
            shape,
            values: values.collect(),
        }
    }

    fn at(&self, indices: [u32; 4]) -> f64 {
        let at = indices
            .iter()
            .zip(self.shape)
            .fold(0, |at, (&ix, n)| at * n + ix.min(n - 1));
        self.values[at as usize]
    }
}

impl Prepared {
    pub fn new(gpu: &Gpu, case: &Case, seed: u64) -> Self {
        let case = case.clone();
        let mut random = Random::new(seed);
        let ([batch, kv_batch], [heads, kv_heads]) = (case.batch, case.heads);
        let ([q_len, k_len], [d, dv]) = (case.len, case.dim);
        let (stored_batch, stored_kv_batch) = match case.ragged {
            Some(_) => (1, 1),
            None => (batch, kv_batch),
        };
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
        let k_row = |kb: u32, h: u32, j: u32| match &cu {
            Some([_, k]) => h * k_len + k[kb as usize] + j,
            None => (rows[(kb * k_len + j) as usize] * kv_heads + h) * k_len + j,
        };

        let mut numbers = |n: u32, magnitude: f64, dtype: DType| -> Vec<f64> {
            (0..n)
                .map(|_| round_to(storage(dtype), magnitude * random.float()))
                .collect()
        };
        let [q_type, k_type, v_type, out_type] = case.types;
        let q = numbers(stored_batch * heads * q_len * d, case.loud, q_type);
        let mut k = numbers(stored_kv_batch * kv_heads * k_len * d, 1.0, k_type);
        let mut v = numbers(stored_kv_batch * kv_heads * k_len * dv, 1.0, v_type);
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
        let mut seen = vec![false; (stored_kv_batch * kv_heads * k_len) as usize];
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
            for h in 0..heads {
                for i in 0..n {
                    let (from, to) = (h * n + i, q_row(b, h, i));
                    let copy = |from_all: &[f64], all: &mut [f64], n: u32, width: u32| {
                        let at = (to * width) as usize;
                        all[at..at + n as usize].copy_from_slice(row(from_all, from, n));
                    };
                    copy(&got.out, &mut want.out, dv, dv);
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
            [stored_kv_batch, kv_heads, k_len, d],
            [stored_kv_batch, kv_heads, k_len, dv],
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
            kv_len: case.kv_len.as_ref().map(|lens| integers(lens)),
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
            case,
        }
    }

    /// What this problem's answers may be off by.
    fn tolerance(&self, dtype: DType) -> Tolerance {
        let base = of_storage(storage(dtype), self.case.len[1] as usize);
        // A score of 10,000 is itself known to a few thousandths in f32, and so is its weight.
        match self.case.loud > 1000.0 {
            true => base.times(200.0),
            false => base,
        }
    }

    /// The options of this case.
    pub fn options(
        &self,
        route: Option<Route>,
        splits: Option<u32>,
        stage: Option<Stage>,
    ) -> Options {
        let case = &self.case;
        let text = |wanted: bool, text: &str| wanted.then(|| Arc::<str>::from(text));
        let mask_mod = match case.function {
            Some(Function::Window) => text(true, MASK_WINDOW),
            Some(Function::Documents) => text(true, MASK_DOCUMENTS),
            _ => None,
        };
        Options {
            scale: case.scale,
            softcap: case.softcap,
            causal: case.causal.is_some(),
            window: case.window,
            align: case.align(),
            t5: case.t5,
            score_mod: text(case.function == Some(Function::Alibi), SCORE_ALIBI),
            mask_mod,
            stage: stage.unwrap_or_default(),
            batch_invariant: case.batch_invariant,
            route,
            splits,
        }
    }

    /// Runs one plan and judges what it wrote and what it left alone.
    pub fn run(
        &self,
        route: Option<Route>,
        splits: Option<u32>,
        stage: Option<Stage>,
    ) -> Result<Answer, String> {
        let (gpu, out_lay) = (&self.gpu, self.lays[3]);
        let out_type = self.case.types[3];
        let n = out_lay.cells as usize;
        let canaries: Vec<u8> = match out_type.size() {
            2 => bytemuck::cast_slice(&NAN_16.frame(0, n, 0)).to_vec(),
            _ => bytemuck::cast_slice(&NAN_32.frame(0, n, 0)).to_vec(),
        };
        let fail = |e: qkv::Error| e.to_string();
        let out = gpu
            .upload("out", out_type, &[n as u32], &canaries)
            .map_err(fail)?;
        let [batch, heads, q_len, _] = out_lay.extents;
        let k_len = self.case.len[1];
        let framed = |cells: u32| {
            gpu.upload_u32(
                "framed",
                &[cells + 16],
                &NAN_32.frame(0, cells as usize, 16),
            )
        };
        let over = |framed: &Tensor, shape: &[u32]| {
            Tensor::from_wgpu(framed.buffer().clone(), DType::F32, shape).unwrap()
        };
        let (rows, cells) = (batch * heads * q_len, batch * heads * q_len * k_len);
        let (lse_frame, weights_frame) =
            (framed(rows).map_err(fail)?, framed(cells).map_err(fail)?);
        let lse = over(&lse_frame, &[batch, heads, q_len]);
        let weights = over(&weights_frame, &[batch, heads, q_len, k_len]);

        let tables = &self.tables;
        let extents = [self.case.batch[0], heads, q_len, k_len];
        let [bias, mask] = [&tables.bias, &tables.mask].map(|tensor| {
            let tensor = tensor.as_ref()?;
            Some(View::broadcast(tensor, extents).unwrap())
        });
        let [q, k, v] = &self.tensors;
        let cu = tables.cu.as_ref();
        let tensors = Tensors {
            kv_len: tables.kv_len.as_ref(),
            q_offset: tables.q_offset.as_ref(),
            prefix_len: tables.prefix.as_ref(),
            cu_q: cu.map(|cu| &cu[0]),
            cu_k: cu.map(|cu| &cu[1]),
            rows: tables.rows.as_ref(),
            bias,
            mask,
            alibi: tables.alibi.as_ref(),
            t5: tables.t5.as_ref(),
            sinks: tables.sinks.as_ref(),
            extra: tables.extra.iter().map(|extra| ("extra", extra)).collect(),
            weights: stage.map(|_| &weights),
            lse: Some(&lse),
            ..Tensors::new(
                self.lays[0].view(q),
                self.lays[1].view(k),
                self.lays[2].view(v),
                out_lay.view(&out),
            )
        };
        let mut recorder = Recorder::new(gpu);
        let options = self.options(route, splits, stage);
        let plan = record(&mut recorder, &tensors, &options).map_err(fail)?;
        let name = format!("{:?} splits {} of {:?}", plan.route, plan.splits, self.case);
        recorder
            .finish()
            .and_then(|recording| gpu.run(&recording))
            .map_err(|e| format!("{name}: {e}"))?;

        let bytes = gpu.read(&out).map_err(|e| format!("{name}: {e}"))?;
        let (values, bits): (Vec<f32>, Vec<u32>) = match out_type.size() {
            2 => out_lay
                .take(NAN_16, bytemuck::pod_collect_to_vec(&bytes))
                .map_err(|e| format!("{name}: {e}"))?
                .iter()
                .map(|&bits| (float_of(out_type, bits), u32::from(bits)))
                .unzip(),
            _ => out_lay
                .take(NAN_32, bytemuck::pod_collect_to_vec(&bytes))
                .map_err(|e| format!("{name}: {e}"))?
                .iter()
                .map(|&bits| (f32::from_bits(bits), bits))
                .unzip(),
        };
        let value_dim = self.case.dim[1] as usize;
        compare_rows(
            &name,
            &values,
            &self.want.out,
            value_dim,
            self.tolerance(out_type),
        )?;
        let read = |what: &str, framed: &Tensor, cells: u32, want: &[f64], len: u32| {
            let name = format!("{what} of {name}");
            let got = gpu.read_floats(framed).map_err(fail)?;
            let got = NAN_32.check_f32(&name, &got, 0..cells as usize)?;
            compare_rows(&name, got, want, len as usize, self.tolerance(DType::F32))?;
            Ok::<_, String>(got.iter().map(|x| x.to_bits()).collect::<Vec<u32>>())
        };
        let lse = read("LSE", &lse_frame, rows, &self.want.lse, 1)?;
        let want = match stage {
            None => None,
            Some(Stage::Raw) => Some(&self.want.raw),
            Some(Stage::Softcap) => Some(&self.want.softcapped),
            Some(Stage::Biased) => Some(&self.want.biased),
            Some(Stage::Softmax) => Some(&self.want.weights),
        };
        let weights = want
            .map(|want| read("weights", &weights_frame, cells, want, k_len))
            .transpose()?;
        Ok(Answer {
            plan,
            out: bits,
            lse,
            weights,
        })
    }

    /// The same problem for another set of powers of the same device.
    pub fn on(self, gpu: &Gpu) -> Self {
        Prepared {
            gpu: gpu.clone(),
            ..self
        }
    }

    /// Spoils one value of the oracle's answer, for tests of the harness.
    pub fn spoil(&mut self) {
        *self.want.out.last_mut().expect("an output") += 0.01;
    }
}

fn row(values: &[f64], row: u32, width: u32) -> &[f64] {
    &values[(row * width) as usize..][..width as usize]
}

fn float_of(dtype: DType, bits: u16) -> f32 {
    match dtype {
        DType::BF16 => half::bf16::from_bits(bits).to_f32(),
        _ => half::f16::from_bits(bits).to_f32(),
    }
}

const SCORE_ALIBI: &str = "
fn score_mod(score: f32, b: u32, h: u32, q: u32, k: u32) -> f32 {
    return score - extra[h] * abs(f32(q) - f32(k));
}";
const MASK_WINDOW: &str = "
fn mask_mod(b: u32, h: u32, q: u32, k: u32) -> bool {
    return max(q, k) - min(q, k) <= 3u;
}";
const MASK_DOCUMENTS: &str = "
fn mask_mod(b: u32, h: u32, q: u32, k: u32) -> bool {
    return extra[q] == extra[k];
}";
