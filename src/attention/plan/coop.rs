//! Whether the prefill route's products go to cooperative matrices, and in which form.

use super::super::problem::Problem;
use crate::gpu::{Caps, DType, MATRIX_SUBGROUPS, MatrixForm};

/// Rows of a subgroup.
const ROWS: u32 = 16;
/// Keys of a tile.
pub(super) const BLOCK_K: u32 = 32;
/// Head dims for whose operands registers and workgroup memory are there, by the kernel's arrays.
const DIMS: std::ops::RangeInclusive<u32> = 8..=128;
/// Value columns of a workgroup; more of them take more workgroups.
const V_BLOCK: u32 = 128;

/// The form of `prefill_coop` for a problem on a device.
#[derive(Clone, Copy)]
pub(super) struct Coop {
    pub(super) form: MatrixForm,
    /// Matrices along D, and along a workgroup's share of Dv.
    pub(super) d_tiles: u32,
    pub(super) v_tiles: u32,
}

impl Coop {
    /// `None` where the device has no such matrices or the problem does not fit them. Their operands are f16,
    /// the weights among them: an output in f32 has a right to better ones, unless products in f16 were asked
    /// for.
    pub(super) fn new(problem: &Problem, caps: &Caps) -> Option<Coop> {
        let form = caps.matrix_form()?;
        let [q, k, v, out] = problem.types;
        let (d, dv) = (problem.head_dim(), problem.value_dim());
        let precise = out == DType::F32 && !problem.options.f16_math;
        let fits =
            [q, k, v] == [DType::F16; 3] && !precise && DIMS.contains(&d) && dv >= *DIMS.start();
        fits.then_some(Coop {
            form,
            d_tiles: d.div_ceil(form.rows),
            v_tiles: dv.min(V_BLOCK).div_ceil(form.rows),
        })
    }

    /// Rows of a workgroup.
    pub(super) fn block_q(self) -> u32 {
        MATRIX_SUBGROUPS * ROWS
    }

    /// Value columns of a workgroup.
    pub(super) fn columns(self) -> u32 {
        self.v_tiles * self.form.rows
    }

    /// Matrices along a subgroup's rows.
    pub(super) fn tiles(self) -> u32 {
        ROWS / self.form.rows
    }

    /// Turns of a tile's products by plain loops, all that they load and store among them.
    pub(super) fn turns(self) -> u32 {
        let MatrixForm { rows, lanes, .. } = self.form;
        let products = (self.d_tiles + self.v_tiles) * self.tiles() * (BLOCK_K / rows);
        products * (rows * rows / lanes * (rows + 2))
    }
}
