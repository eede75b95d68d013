//! A cache in pages: sequences of any length in one pool, with shared beginnings and forks.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::book::{Book, Keep, NO_PAGE, SequenceId, groups, unseen};
use crate::gpu::{DType, Gpu, Recorder, Shader, Tensor};
use crate::{Error, Result};

/// The extents of a paged cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagedExtents {
    /// Layers.
    pub layers: u32,
    /// Pages of each layer, N.
    pub pages: u32,
    /// Positions of a page, S.
    pub page_len: u32,
    /// KV heads, Hk.
    pub kv_heads: u32,
    /// Head dim, D.
    pub head_dim: u32,
}

/// Keys and values of many sequences, in pages that a table names for each (vLLM's PagedAttention, Kwon et al.
/// 2023). Kernels read them in place; sequences that begin alike share their pages.
pub struct PagedCache {
    gpu: Gpu,
    extents: PagedExtents,
    /// By layer. `[N, Hk, S, D]`
    k: Vec<Tensor>,
    /// By layer. `[N, Hk, S, D]`
    v: Vec<Tensor>,
    book: Book,
}

/// Some sequences of a cache as a step sees them, on the device.
pub struct Tables {
    /// The page of each stretch of each sequence. u32 `[B, M]`
    pub pages: Tensor,
    /// Positions that each one fills. u32 `[B]`
    pub lengths: Tensor,
}

impl PagedCache {
    /// An empty cache; keys and values are stored as `types` says: floats, q8_0 or q4_0.
    ///
    /// # Errors
    /// [`Error::Refused`] for extents of zero, pages that are no whole words, and blocks that do not fit the
    /// head dim; [`Error::OutOfMemory`] where the pages do not fit.
    pub fn new(gpu: &Gpu, types: [DType; 2], extents: PagedExtents) -> Result<Self> {
        let PagedExtents {
            layers,
            pages,
            page_len,
            kv_heads,
            head_dim,
        } = extents;
        for (name, value) in [
            ("layers", layers),
            ("pages", pages),
            ("page_len", page_len),
            ("kv_heads", kv_heads),
            ("head_dim", head_dim),
        ] {
            if value == 0 {
                return Err(Error::refused(name, value, "at least 1"));
            }
        }
        let shape = [pages, kv_heads, page_len, head_dim];
        super::check_types(gpu, types, &shape)?;
        let whole = |dtype: &DType| dtype.bytes(&shape[1..]).is_multiple_of(4);
        if let Some(dtype) = types.iter().find(|dtype| !whole(dtype)) {
            let is = format!("{} {shape:?}", dtype.name());
            let bound = "pages of whole words";
            return Err(Error::refused("the cache's storage", is, bound));
        }
        let block = |name: &str, dtype| gpu.empty(name, dtype, &shape);
        Ok(PagedCache {
            gpu: gpu.clone(),
            extents,
            k: (0..layers)
                .map(|_| block("k pages", types[0]))
                .collect::<Result<_>>()?,
            v: (0..layers)
                .map(|_| block("v pages", types[1]))
                .collect::<Result<_>>()?,
            book: Book::new(pages, page_len),
        })
    }

    /// Its extents.
    pub fn extents(&self) -> PagedExtents {
        self.extents
    }

    /// Keys and values of a layer: the pools. `[N, Hk, S, D]`
    ///
    /// # Panics
    /// For a layer that is not there.
    pub fn layer(&self, layer: usize) -> [&Tensor; 2] {
        [&self.k[layer], &self.v[layer]]
    }

    /// Bytes of a page of all layers, keys and values.
    pub fn page_bytes(&self) -> u64 {
        let page = |tensor: &Tensor| tensor.bytes() / u64::from(self.extents.pages);
        self.k.iter().chain(&self.v).map(page).sum()
    }

    /// Bytes of all pages, held or not.
    pub fn bytes(&self) -> u64 {
        self.page_bytes() * u64::from(self.extents.pages)
    }

    /// Bytes of the pages that sequences hold; a shared page counts once.
    pub fn used_bytes(&self) -> u64 {
        self.page_bytes() * u64::from(self.book.used())
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> u32 {
        self.extents.pages - self.book.used()
    }

    /// A new sequence. Where others hold the first whole pages of `tokens`, it has those already, but never
    /// the last token: [`PagedCache::len`] says how many. It takes no page yet.
    pub fn start(&mut self, tokens: &[u32], keep: Keep) -> SequenceId {
        self.book.start(tokens, keep)
    }

    /// Makes room for tokens behind a sequence's last, which the step that this recording belongs to will
    /// write; the copy of a page that others hold too is recorded first.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where there are too few free pages: then nothing has changed, for this sequence or
    /// any other.
    pub fn append(
        &mut self,
        recorder: &mut Recorder,
        id: SequenceId,
        tokens: &[u32],
    ) -> Result<()> {
        if let Some([from, to]) = self.book.append(id, tokens)? {
            for tensor in self.k.iter().chain(&self.v) {
                let words = (tensor.bytes() / u64::from(self.extents.pages) / 4) as u32;
                let shader = Shader::new("copy_page");
                let groups = u64::from(words).div_ceil(64);
                recorder.dispatch(&shader, [words, from, to, 0], &[tensor], groups)?;
            }
        }
        Ok(())
    }

    /// Cuts a sequence back to its first `len` positions.
    ///
    /// # Errors
    /// [`Error::Refused`] for more than it has, and where a window has given back what would be seen again.
    pub fn truncate(&mut self, id: SequenceId, len: u32) -> Result<()> {
        self.book.truncate(id, len)
    }

    /// A second sequence that goes on from all that the first has. Nothing is copied until one of them writes
    /// to a page that both hold.
    ///
    /// # Errors
    /// [`Error::Refused`] for a sequence that is removed.
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        self.book.fork(id)
    }

    /// Gives a sequence's pages back, those that no other holds.
    ///
    /// # Errors
    /// [`Error::Refused`] for a sequence that is removed already.
    pub fn remove(&mut self, id: SequenceId) -> Result<()> {
        self.book.remove(id)
    }

    /// Positions that a sequence fills.
    ///
    /// # Errors
    /// [`Error::Refused`] for a sequence that is removed.
    pub fn len(&self, id: SequenceId) -> Result<u32> {
        self.book.len(id)
    }

    /// A sequence's tokens.
    ///
    /// # Errors
    /// [`Error::Refused`] for a sequence that is removed.
    pub fn tokens(&self, id: SequenceId) -> Result<&[u32]> {
        self.book.tokens(id)
    }

    /// What a step over these sequences binds, in their order.
    ///
    /// # Errors
    /// [`Error::Refused`] for none, and for a sequence that is removed.
    pub fn tables(&self, ids: &[SequenceId]) -> Result<Tables> {
        self.tables_behind(ids, &vec![0; ids.len()])
    }

    /// Sequences, each with its number of new tokens, by the first pages that they have in common and that hold none of
    /// those: members as places in `new`, and how many pages.
    pub(crate) fn shared(&self, new: &[(SequenceId, u32)]) -> Result<Vec<(Vec<usize>, usize)>> {
        let before = |&(id, n): &(SequenceId, u32)| -> Result<&[u32]> {
            let pages = self.book.pages(id)?;
            let full = self.book.len(id)?.saturating_sub(n) / self.extents.page_len;
            let held = pages.iter().take(full as usize);
            Ok(&pages[..held.take_while(|&&page| page != NO_PAGE).count()])
        };
        let rows = new.iter().map(before).collect::<Result<Vec<_>>>()?;
        Ok(groups(&rows))
    }

    /// [`PagedCache::tables`] of sequences without their first pages, as many as `skip` says.
    pub(crate) fn tables_behind(&self, ids: &[SequenceId], skip: &[usize]) -> Result<Tables> {
        let rows = ids
            .iter()
            .zip(skip)
            .map(|(&id, &skip)| {
                let skipped = skip as u32 * self.extents.page_len;
                Ok((&self.book.pages(id)?[skip..], self.book.len(id)? - skipped))
            })
            .collect::<Result<Vec<_>>>()?;
        self.upload(&rows)
    }

    /// The first pages of sequences, as many as `first` says of each.
    pub(crate) fn tables_of_first(&self, ids: &[SequenceId], first: &[usize]) -> Result<Tables> {
        let rows = ids
            .iter()
            .zip(first)
            .map(|(&id, &first)| {
                let len = first as u32 * self.extents.page_len;
                Ok((&self.book.pages(id)?[..first], len))
            })
            .collect::<Result<Vec<_>>>()?;
        self.upload(&rows)
    }

    /// Rows of pages, each with the positions that it fills.
    fn upload(&self, rows: &[(&[u32], u32)]) -> Result<Tables> {
        let longest = rows.iter().map(|(pages, _)| pages.len()).max();
        let m = longest
            .ok_or_else(|| Error::refused("sequences", 0, "one at least"))?
            .max(1);
        let mut pages = vec![NO_PAGE; m * rows.len()];
        for (to, (row, _)) in pages.chunks_mut(m).zip(rows) {
            to[..row.len()].copy_from_slice(row);
        }
        let lengths: Vec<u32> = rows.iter().map(|&(_, len)| len).collect();
        let n = rows.len() as u32;
        Ok(Tables {
            pages: self.gpu.upload_u32("pages", &[n, m as u32], &pages)?,
            lengths: self.gpu.upload_u32("lengths", &[n], &lengths)?,
        })
    }

    /// What every saved sequence of this cache says of it; `tag` names the model.
    fn facts(&self, tag: &str) -> HashMap<String, String> {
        let e = self.extents;
        let sizes = [e.layers, e.page_len, e.kv_heads, e.head_dim];
        let types = self.layer(0).map(|tensor| tensor.dtype().name());
        HashMap::from([
            ("model".into(), tag.into()),
            (
                "layers, page_len, kv_heads, head_dim".into(),
                format!("{sizes:?}"),
            ),
            ("types".into(), types.join(", ")),
        ])
    }

    /// Saves a sequence, bit for bit, to a safetensors file. `tag` names the model it belongs to. Waits for
    /// everything submitted before.
    ///
    /// # Errors
    /// [`Error::Refused`] for a sequence that is removed, [`Error::File`] where the file cannot be written.
    pub fn save(&self, id: SequenceId, tag: &str, path: &Path) -> Result<()> {
        let pages = self.book.pages(id)?;
        let held: Vec<u32> = pages.iter().copied().filter(|&p| p != NO_PAGE).collect();
        let kept: Vec<u8> = pages.iter().map(|&p| u8::from(p != NO_PAGE)).collect();
        let keep = self.book.keep(id)?;
        let mut facts = self.facts(tag);
        facts.insert("window".into(), format!("{:?}", keep.window));
        let tokens = self.book.tokens(id)?;
        let window = [keep.window.unwrap_or(u32::MAX), keep.first];
        let mut all: Vec<(String, Dtype, usize, Cow<[u8]>)> = vec![
            (
                "tokens".into(),
                Dtype::U32,
                tokens.len(),
                bytemuck::cast_slice(tokens).into(),
            ),
            ("kept".into(), Dtype::U8, kept.len(), kept.into()),
            (
                "keep".into(),
                Dtype::U32,
                2,
                bytemuck::bytes_of(&window).to_vec().into(),
            ),
        ];
        for (name, tensors) in [("k", &self.k), ("v", &self.v)] {
            for (layer, tensor) in tensors.iter().enumerate() {
                let pool = self.gpu.read(tensor)?;
                let size = pool.len() / self.extents.pages as usize;
                let mut bytes = Vec::with_capacity(held.len() * size);
                for &page in &held {
                    bytes.extend_from_slice(&pool[page as usize * size..][..size]);
                }
                all.push((
                    format!("{name}.{layer}"),
                    Dtype::U8,
                    bytes.len(),
                    bytes.into(),
                ));
            }
        }
        let views = all.iter().map(|(name, dtype, n, bytes)| {
            let view = TensorView::new(*dtype, vec![*n], bytes);
            (name, view.expect("as many bytes as elements"))
        });
        safetensors::serialize_to_file(views, Some(facts), path).map_err(|e| Error::file(path, e))
    }

    /// A saved sequence, to go on from where it was.
    ///
    /// # Errors
    /// [`Error::File`] for a file that is damaged, or saved from another model's cache; [`Error::OutOfMemory`]
    /// where there are too few free pages. Then nothing has changed.
    pub fn restore(&mut self, tag: &str, path: &Path) -> Result<SequenceId> {
        let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
        let wrong = |what: String| Error::file(path, what);
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| wrong(e.to_string()))?;
        let said = header.metadata().clone().unwrap_or_default();
        for (name, here) in self.facts(tag) {
            let there = said.get(&name).map_or("nothing", |value| value);
            if there != here {
                return Err(wrong(format!("{name}: {there}, and here {here}")));
            }
        }
        let file = SafeTensors::deserialize(&bytes).map_err(|e| wrong(e.to_string()))?;
        let data = |name: &str| {
            let found = file
                .tensor(name)
                .map_err(|e| wrong(format!("{name}: {e}")))?;
            Ok::<_, Error>(found.data())
        };
        let words = |name: &str| Ok::<Vec<u32>, Error>(bytemuck::pod_collect_to_vec(data(name)?));
        let (tokens, kept) = (words("tokens")?, data("kept")?);
        let stretches = tokens.len().div_ceil(self.extents.page_len as usize);
        let &[window, first] = words("keep")?.as_slice() else {
            return Err(wrong("keep: two numbers".into()));
        };
        if kept.len() != stretches {
            return Err(wrong(format!(
                "kept: {} stretches of {stretches}",
                kept.len()
            )));
        }
        let seen = match window {
            u32::MAX => 0,
            window => unseen(tokens.len() as u32, window),
        };
        let seen = (seen / self.extents.page_len) as usize;
        if kept.iter().skip(seen).any(|&kept| kept == 0) {
            return Err(wrong(
                "kept: pages that the next query sees are not there".into(),
            ));
        }
        let held = kept.iter().filter(|&&kept| kept != 0).count();
        let mut blocks = Vec::new();
        for (name, tensors) in [("k", &self.k), ("v", &self.v)] {
            for (layer, tensor) in tensors.iter().enumerate() {
                let size = (tensor.bytes() / u64::from(self.extents.pages)) as usize;
                let name = format!("{name}.{layer}");
                let block = data(&name)?;
                if block.len() != held * size {
                    return Err(wrong(format!(
                        "{name}: {} bytes of {}",
                        block.len(),
                        held * size
                    )));
                }
                blocks.push((tensor, block, size));
            }
        }
        let keep = Keep {
            window: (window != u32::MAX).then_some(window),
            first,
        };
        let kept: Vec<bool> = kept.iter().map(|&kept| kept != 0).collect();
        let id = self.book.restore(&tokens, &kept, keep)?;
        let pages = self.book.pages(id)?.iter().filter(|&&page| page != NO_PAGE);
        for (ix, &page) in pages.enumerate() {
            for &(tensor, block, size) in &blocks {
                let at = u64::from(page) * size as u64;
                self.gpu.write_at(tensor, at, &block[ix * size..][..size])?;
            }
        }
        Ok(id)
    }
}
