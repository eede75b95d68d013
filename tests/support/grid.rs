//! Attention problems on the device, each beside the oracle's answer.
//!
//! Whatever a kernel may not read is NaN: keys and values at or past `kv_len`, gaps between rows, cells
//! that no history names. Whatever it may not write is a canary, which is checked afterwards.

#![allow(dead_code, reason = "every test file uses its own part of this")]

use qkv::attention::{Align, Options, Plan, Route, Tensors, View, record};
use qkv::gpu::{DType, Gpu, Recorder, Tensor};
use qkv::reference::{self, Attention, AttentionOut, Offset};

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
}

/// One problem, still without numbers.
#[derive(Clone, Debug)]
pub struct Case {
    /// Batch rows of Q; of K and V.
    pub batch: [u32; 2],
    /// Query heads; KV heads.
    pub heads: [u32; 2],
    /// Queries; keys.
    pub len: [u32; 2],
    /// D; Dv.
    pub dim: [u32; 2],
    pub causal: Option<Align>,
    pub kv_len: Option<Vec<u32>>,
    /// Whether a table of histories says where each key lies.
    pub histories: bool,
    pub place: Place,
    /// Storage of q; of k and v; of out.
    pub types: [DType; 3],
    pub scale: Option<f32>,
    /// The largest magnitude in q.
    pub loud: f64,
}

impl Case {
    pub fn new(batch: [u32; 2], heads: [u32; 2], len: [u32; 2], dim: [u32; 2]) -> Self {
        Case {
            batch,
            heads,
            len,
            dim,
            causal: None,
            kv_len: None,
            histories: false,
            place: Place::Dense,
            types: [DType::F32; 3],
            scale: None,
            loud: 4.0,
        }
    }
}

/// The name of a storage type in the table of tolerances.
fn storage(dtype: DType) -> &'static str {
    dtype.wgsl()
}

/// Where the elements of one tensor lie.
#[derive(Clone, Copy)]
struct Lay {
    extents: [u32; 4],
    offset: u32,
    strides: [u32; 3],
    /// Cells of the buffer.
    cells: u32,
}

impl Lay {
    fn new(place: Place, extents: [u32; 4]) -> Lay {
        let [b, h, l, d] = extents;
        let (offset, strides) = match place {
            Place::Dense => (0, [h * l * d, l * d, d]),
            Place::Columns | Place::Packed => (0, [l * h * d, d, h * d]),
            Place::Gaps(n) => {
                let row = d + n;
                let head = l * row + n;
                (2 * n, [h * head + n, head, row])
            }
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
            strides: [sb, sh, sl],
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
        let d = self.extents[3] as usize;
        for (at, row) in self.rows().zip(values.chunks(d)) {
            for (cell, &value) in cells[at..at + d].iter_mut().zip(row) {
                *cell = value as f32;
            }
        }
    }

    fn view<'t>(&self, tensor: &'t Tensor) -> View<'t> {
        View::new(tensor, self.extents, self.offset, self.strides).expect("a view in its buffer")
    }

    /// Takes the rows out of what was read back. An error where a cell outside them was written.
    fn take<T: Copy + PartialEq + std::fmt::LowerHex>(
        &self,
        canary: Canary<T>,
        mut cells: Vec<T>,
    ) -> Result<Vec<T>, String> {
        let d = self.extents[3] as usize;
        let mut values = Vec::new();
        for at in self.rows() {
            values.extend_from_slice(&cells[at..at + d]);
            cells[at..at + d].fill(canary.0);
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
    kv_len: Option<Tensor>,
    rows: Option<Tensor>,
    want: AttentionOut,
}

/// What a run gave: the bits of `out` and of the weights, in their order.
#[derive(Debug, PartialEq)]
pub struct Answer {
    pub plan: Plan,
    pub out: Vec<u32>,
    pub weights: Option<Vec<u32>>,
}

impl Prepared {
    pub fn new(gpu: &Gpu, case: &Case, seed: u64) -> Self {
        let case = case.clone();
        let mut random = Random::new(seed);
        let ([batch, kv_batch], [heads, kv_heads]) = (case.batch, case.heads);
        let ([q_len, k_len], [d, dv]) = (case.len, case.dim);
        let kv_len = case
            .kv_len
            .clone()
            .unwrap_or_else(|| vec![k_len; kv_batch as usize]);

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
        let row_of = |kb: u32, j: u32| rows[(kb * k_len + j) as usize];
        let mut seen = vec![false; (kv_batch * k_len) as usize];
        for kb in 0..kv_batch {
            for j in 0..kv_len[kb as usize] {
                seen[(row_of(kb, j) * k_len + j) as usize] = true;
            }
        }

        let mut numbers = |n: u32, magnitude: f64, dtype: DType| -> Vec<f64> {
            (0..n)
                .map(|_| round_to(storage(dtype), magnitude * random.float()))
                .collect()
        };
        let [q_type, kv_type, out_type] = case.types;
        let q = numbers(batch * heads * q_len * d, case.loud, q_type);
        // Keys and values as they are stored: NaN where no query may look.
        let mut stored = |width: u32| -> Vec<f64> {
            let mut values = numbers(kv_batch * kv_heads * k_len * width, 1.0, kv_type);
            for (at, row) in values.chunks_mut(width as usize).enumerate() {
                let (j, b) = (at as u32 % k_len, at as u32 / (kv_heads * k_len));
                if !seen[(b * k_len + j) as usize] {
                    row.fill(f64::NAN);
                }
            }
            values
        };
        let (k, v) = (stored(d), stored(dv));
        // The same for each batch row of Q, as the oracle wants them.
        let share = batch / kv_batch;
        let expand = |values: &[f64], width: u32| -> Vec<f64> {
            let mut all = Vec::new();
            for b in 0..batch {
                let kb = b / share;
                for head in 0..kv_heads {
                    for j in 0..k_len {
                        let row = match j < kv_len[kb as usize] {
                            true => row_of(kb, j),
                            false => kb,
                        };
                        let at = (((row * kv_heads + head) * k_len + j) * width) as usize;
                        all.extend_from_slice(&values[at..at + width as usize]);
                    }
                }
            }
            all
        };
        let (k_all, v_all) = (expand(&k, d), expand(&v, dv));
        let lengths: Vec<usize> = (0..batch)
            .map(|b| kv_len[(b / share) as usize] as usize)
            .collect();
        let extents = |of: [u32; 4]| of.map(|n| n as usize);
        let mut problem = Attention::new(
            extents([batch, heads, q_len, d]),
            extents([batch, kv_heads, k_len, dv]),
            &q,
            &k_all,
            &v_all,
        );
        problem.kv_len = Some(&lengths);
        problem.causal = case.causal.is_some();
        problem.offset = match case.causal {
            Some(Align::TopLeft) => Offset::TopLeft,
            _ => Offset::BottomRight,
        };
        problem.scale = f64::from(case.scale.unwrap_or(1.0 / (d as f32).sqrt()));
        let want = reference::attention(&problem);

        let mut lays = [
            [batch, heads, q_len, d],
            [kv_batch, kv_heads, k_len, d],
            [kv_batch, kv_heads, k_len, dv],
            [batch, heads, q_len, dv],
        ]
        .map(|extents| Lay::new(case.place, extents));
        if case.place == Place::Packed {
            assert!(batch == kv_batch && q_len == k_len && d == dv && q_type == kv_type);
            let width = (heads + 2 * kv_heads) * d;
            let columns = [0, heads * d, (heads + kv_heads) * d];
            for (lay, column) in lays.iter_mut().zip(columns) {
                lay.offset = column;
                lay.strides = [q_len * width, d, width];
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
                upload(&lays[1..2], &[&k], kv_type),
                upload(&lays[2..3], &[&v], kv_type),
            ],
        };
        assert!(matches!(out_type, DType::F32 | DType::F16));
        Prepared {
            gpu: gpu.clone(),
            tensors,
            lays,
            kv_len: case
                .kv_len
                .as_ref()
                .map(|lengths| gpu.upload_u32("kv_len", &[kv_batch], lengths).unwrap()),
            rows: case
                .histories
                .then(|| gpu.upload_u32("rows", &[kv_batch, k_len], &rows).unwrap()),
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

    /// Runs one plan and judges what it wrote and what it left alone.
    pub fn run(
        &self,
        route: Option<Route>,
        splits: Option<u32>,
        with_weights: bool,
    ) -> Result<Answer, String> {
        let (gpu, out_lay) = (&self.gpu, self.lays[3]);
        let [_, _, out_type] = self.case.types;
        let n = out_lay.cells as usize;
        let canaries: Vec<u8> = match out_type {
            DType::F16 => bytemuck::cast_slice(&NAN_16.frame(0, n, 0)).to_vec(),
            _ => bytemuck::cast_slice(&NAN_32.frame(0, n, 0)).to_vec(),
        };
        let out = gpu
            .upload("out", out_type, &[n as u32], &canaries)
            .map_err(|e| e.to_string())?;
        let ([batch, _], [heads, _], [q_len, k_len]) =
            (self.case.batch, self.case.heads, self.case.len);
        let cells = (batch * heads * q_len * k_len) as usize;
        let framed = gpu
            .upload_u32("weights", &[cells as u32 + 16], &NAN_32.frame(0, cells, 16))
            .map_err(|e| e.to_string())?;
        let shape = [batch, heads, q_len, k_len];
        let weights = Tensor::from_wgpu(framed.buffer().clone(), DType::F32, &shape).unwrap();

        let [q, k, v] = &self.tensors;
        let tensors = Tensors {
            q: self.lays[0].view(q),
            k: self.lays[1].view(k),
            v: self.lays[2].view(v),
            out: out_lay.view(&out),
            kv_len: self.kv_len.as_ref(),
            rows: self.rows.as_ref(),
            weights: with_weights.then_some(&weights),
        };
        let options = Options {
            scale: self.case.scale,
            causal: self.case.causal.is_some(),
            align: self.case.causal.unwrap_or_default(),
            route,
            splits,
        };
        let mut recorder = Recorder::new(gpu);
        let plan = record(&mut recorder, &tensors, &options).map_err(|e| e.to_string())?;
        let name = format!("{:?} splits {} of {:?}", plan.route, plan.splits, self.case);
        recorder
            .finish()
            .and_then(|recording| gpu.run(&recording))
            .map_err(|e| format!("{name}: {e}"))?;

        let bytes = gpu.read(&out).map_err(|e| format!("{name}: {e}"))?;
        let (values, bits): (Vec<f32>, Vec<u32>) = match out_type {
            DType::F16 => out_lay
                .take(NAN_16, bytemuck::pod_collect_to_vec(&bytes))
                .map_err(|e| format!("{name}: {e}"))?
                .iter()
                .map(|&bits| (half::f16::from_bits(bits).to_f32(), u32::from(bits)))
                .unzip(),
            _ => out_lay
                .take(NAN_32, bytemuck::pod_collect_to_vec(&bytes))
                .map_err(|e| format!("{name}: {e}"))?
                .iter()
                .map(|&bits| (f32::from_bits(bits), bits))
                .unzip(),
        };
        compare_rows(
            &name,
            &values,
            &self.want.out,
            self.case.dim[1] as usize,
            self.tolerance(out_type),
        )?;
        let weights = match with_weights {
            false => None,
            true => {
                let got = gpu.read_floats(&framed).map_err(|e| e.to_string())?;
                let got = NAN_32.check_f32(&name, &got, 0..cells)?;
                compare_rows(
                    &format!("weights of {name}"),
                    got,
                    &self.want.weights,
                    k_len as usize,
                    self.tolerance(DType::F32),
                )?;
                Some(got.iter().map(|x| x.to_bits()).collect())
            }
        };
        Ok(Answer {
            plan,
            out: bits,
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
