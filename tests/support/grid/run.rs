//! Running a prepared problem, and judging what it wrote and what it left alone.

use std::sync::Arc;

use qkv::attention::{Options, Route, Stage, Tensors, View, record};
use qkv::gpu::{DType, Gpu, Recorder, Tensor};

use super::{Answer, Function, Prepared, storage};
use crate::compare::{
    NAN_16, NAN_32, Tolerance, beside_plain, compare_rows, tolerance as of_storage,
};

impl Prepared {
    /// What this problem's answers may be off by.
    fn tolerance(&self, dtype: DType) -> Tolerance {
        let base = of_storage(storage(dtype), self.case.len[1] as usize);
        // Weights and products are rounded before the output is.
        let base = match (self.case.f16_math, dtype) {
            (true, DType::F16) => base.times(4.0),
            _ => base,
        };
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
            f16_math: case.f16_math,
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
            cu_k: cu.map(|cu| &cu[1]).filter(|_| tables.pages.is_none()),
            pages: tables.pages.as_ref(),
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
        let beside = self.plain.as_ref().map(|plain| {
            let (of, want) = (storage(out_type), &self.want.out);
            // Errors of f16 products are chance as the plain ones are: all rows of a head tell, one row does not.
            let rows = if self.case.f16_math { q_len } else { 1 };
            let len = rows as usize * value_dim;
            beside_plain(&name, of, &values, plain, want, len)
        });
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
            beside_plain: beside.transpose()?,
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

    /// Replaces the plain computation by one that makes hardly an error, for tests of the harness.
    pub fn sharpen(&mut self) {
        let out = self.want.out.iter();
        self.plain = Some(out.map(|x| f64::from(*x as f32)).collect());
    }
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
