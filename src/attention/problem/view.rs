//! Tensors seen as `[batch, heads, rows, columns]`.

use crate::gpu::Tensor;
use crate::gpu::blocks::{BLOCK, row_words};
use crate::{Error, Result};

/// A tensor seen as `[batch, heads, rows, columns]`, each axis with a stride of its own.
#[derive(Clone, Debug)]
pub struct View<'a> {
    pub(crate) tensor: &'a Tensor,
    pub(crate) layout: Layout,
}

/// Where a view's elements lie: extents, offset and strides in elements, or in words where the tensor is
/// quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `[batch, heads, rows, columns]`.
    pub extents: [u32; 4],
    /// The first element.
    pub offset: u32,
    /// Steps between batches, heads, rows and columns. Zero repeats.
    pub strides: [u32; 4],
    /// Words of a quantised row; 0 where columns are elements.
    pub(crate) row_words: u32,
}

impl Layout {
    /// One past the last element.
    pub(crate) fn end(&self) -> u128 {
        if self.extents.contains(&0) {
            return 0;
        }
        let reach = self.extents.iter().zip(self.strides);
        let reach = reach.map(|(&n, stride)| (n as u128 - 1) * stride as u128);
        self.offset as u128 + reach.sum::<u128>() + 1
    }

    /// Whether no two of its elements are one: each stride steps over all that the lesser ones reach.
    pub(crate) fn disjoint(&self) -> bool {
        if self.extents.contains(&0) {
            return true;
        }
        let mut axes: Vec<(u128, u128)> = self
            .strides
            .iter()
            .zip(self.extents)
            .map(|(&stride, n)| (stride as u128, n as u128))
            .filter(|&(_, n)| n > 1)
            .collect();
        axes.sort_unstable();
        let mut reach = 1;
        for (stride, n) in axes {
            if stride < reach {
                return false;
            }
            reach += stride * (n - 1);
        }
        true
    }

    /// Whether four columns may be read at once from every fourth.
    pub(crate) fn aligned(&self) -> bool {
        let [sb, sh, sl, sd] = self.strides;
        if self.row_words > 0 {
            return true;
        }
        sd == 1
            && [self.offset, sb, sh, sl, self.extents[3]]
                .iter()
                .all(|n| n % 4 == 0)
    }

    /// The first element and one past the last of some batch rows and heads.
    pub(crate) fn span(&self, batch: [u32; 2], heads: [u32; 2]) -> [u64; 2] {
        let [_, _, l, d] = self.extents.map(u64::from);
        let [sb, sh, sl, sd] = self.strides.map(u64::from);
        if self.extents.contains(&0) {
            return [0, 0];
        }
        let at = |b: u32, h: u32| self.offset as u64 + b as u64 * sb + h as u64 * sh;
        let last = match self.row_words {
            0 => (l - 1) * sl + (d - 1) * sd,
            words => (l - 1) * sl + words as u64 - 1,
        };
        [
            at(batch[0], heads[0]),
            at(batch[1] - 1, heads[1] - 1) + last + 1,
        ]
    }
}

impl<'a> View<'a> {
    /// `[batch, heads, rows, columns]`.
    pub fn extents(&self) -> [u32; 4] {
        self.layout.extents
    }

    /// A dense tensor `[B, H, L, D]`.
    pub fn bhld(tensor: &'a Tensor) -> Result<Self> {
        let &[b, h, l, d] = tensor.shape.as_slice() else {
            return Err(Error::refused(
                "a view of [B, H, L, D]",
                format_args!("{:?}", tensor.shape),
                "four extents",
            ));
        };
        let row = l.saturating_mul(d);
        View::new(tensor, [b, h, l, d], 0, [h.saturating_mul(row), row, d])
    }

    /// A dense tensor `[B, L, H, D]`, seen as `[B, H, L, D]`.
    pub fn blhd(tensor: &'a Tensor) -> Result<Self> {
        let &[b, l, h, d] = tensor.shape.as_slice() else {
            return Err(Error::refused(
                "a view of [B, L, H, D]",
                format_args!("{:?}", tensor.shape),
                "four extents",
            ));
        };
        View::packed(tensor, [b, h, l, d], h.saturating_mul(d), 0)
    }

    /// Heads next to each other in rows of `width` elements, from column `column` on: `[B, L, H, D]`, or
    /// the queries, keys or values of a packed projection.
    pub fn packed(tensor: &'a Tensor, extents: [u32; 4], width: u32, column: u32) -> Result<Self> {
        let [_, _, l, d] = extents;
        View::new(tensor, extents, column, [l.saturating_mul(width), d, width])
    }

    /// A dense tensor of four extents, those that are 1 repeated up to `extents`: a bias or a mask.
    ///
    /// # Errors
    /// [`Error::Refused`] where an extent is neither 1 nor the one wanted.
    pub fn broadcast(tensor: &'a Tensor, extents: [u32; 4]) -> Result<Self> {
        let fits = tensor.shape.len() == 4
            && tensor
                .shape
                .iter()
                .zip(extents)
                .all(|(&n, wanted)| n == wanted || n == 1);
        if !fits {
            return Err(Error::refused(
                "a tensor to broadcast",
                format_args!("{:?}", tensor.shape),
                format!("each extent is 1 or that of {extents:?}"),
            ));
        }
        let mut strides = [0; 4];
        let mut step = 1u32;
        for axis in (0..4).rev() {
            if tensor.shape[axis] > 1 {
                strides[axis] = step;
            }
            step = step.saturating_mul(tensor.shape[axis]);
        }
        View::strided(tensor, extents, 0, strides)
    }

    /// Any view with columns next to each other; `strides` over batch, head and row, in elements.
    ///
    /// # Errors
    /// [`Error::Refused`] where the view leaves the tensor's elements.
    pub fn new(
        tensor: &'a Tensor,
        extents: [u32; 4],
        offset: u32,
        strides: [u32; 3],
    ) -> Result<Self> {
        let [sb, sh, sl] = strides;
        View::strided(tensor, extents, offset, [sb, sh, sl, 1])
    }

    /// Any view; `strides` over batch, head, row and column, in elements.
    ///
    /// # Errors
    /// [`Error::Refused`] where the view leaves the tensor's elements, and where one of a quantised tensor
    /// begins within a row.
    pub fn strided(
        tensor: &'a Tensor,
        extents: [u32; 4],
        offset: u32,
        strides: [u32; 4],
    ) -> Result<Self> {
        let layout = Layout {
            extents,
            offset,
            strides,
            row_words: 0,
        };
        if layout.end() > tensor.len() as u128 || layout.end() > u32::MAX as u128 {
            return Err(Error::refused(
                "a view",
                format_args!("{layout:?}"),
                format!("its tensor has {} elements", tensor.len()),
            ));
        }
        match tensor.dtype.is_quantized() {
            true => View::of_blocks(tensor, layout),
            false => Ok(View { tensor, layout }),
        }
    }

    /// A view of a quantised tensor: whole rows from their first column on, counted in words.
    fn of_blocks(tensor: &'a Tensor, layout: Layout) -> Result<Self> {
        let columns = tensor.shape.last().copied().unwrap_or(0);
        let [sb, sh, sl, sd] = layout.strides;
        let steps = [layout.offset, sb, sh, sl];
        let whole = |n: &u32| n.is_multiple_of(columns);
        if columns == 0
            || !columns.is_multiple_of(BLOCK as u32)
            || sd != 1
            || layout.extents[3] > columns
            || !steps.iter().all(whole)
        {
            return Err(Error::refused(
                "a view of a quantised tensor",
                format_args!("{layout:?} of {:?}", tensor.shape),
                format!("rows of whole blocks of {BLOCK}, from their first column on"),
            ));
        }
        let row_words = row_words(tensor.dtype, columns);
        let words = |n: u32| n / columns * row_words;
        let layout = Layout {
            offset: words(layout.offset),
            strides: [words(sb), words(sh), words(sl), 1],
            row_words,
            ..layout
        };
        Ok(View { tensor, layout })
    }
}
