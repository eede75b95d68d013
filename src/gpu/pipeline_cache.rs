//! The driver's pipeline cache on disk, so that the second start compiles nothing anew.

use std::path::{Path, PathBuf};

/// The driver's cache and the file that it is kept in.
pub(super) struct DiskCache {
    cache: wgpu::PipelineCache,
    path: PathBuf,
    /// Bytes of what was read; none where the file was damaged or absent.
    read: usize,
}

impl DiskCache {
    /// The cache of that adapter under the user's cache directory; none where the backend has none.
    pub fn open(device: &wgpu::Device, info: &wgpu::AdapterInfo) -> Option<Self> {
        if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let key = wgpu::util::pipeline_cache_key(info)?;
        let name = format!("{key}-{}", env!("CARGO_PKG_VERSION"));
        let path = dirs::cache_dir()?.join("qkv").join(name);
        let data = std::fs::read(&path).ok().and_then(unseal);
        // SAFETY: the data comes from `PipelineCache::get_data` of an adapter with the same key, and
        // `unseal` has checked that it is whole; `fallback` lets the driver ignore what it cannot use.
        let read = data.as_ref().map_or(0, Vec::len);
        let cache = unsafe {
            device.create_pipeline_cache(&wgpu::PipelineCacheDescriptor {
                label: Some("qkv"),
                data: data.as_deref(),
                fallback: true,
            })
        };
        Some(DiskCache { cache, path, read })
    }

    pub fn handle(&self) -> &wgpu::PipelineCache {
        &self.cache
    }

    /// Writes the file anew. A failure costs time at the next start and nothing else.
    pub fn save(&self) {
        let Some(data) = self.cache.get_data() else {
            return;
        };
        if data.len() == self.read {
            return;
        }
        if let Err(e) = replace_file(&self.path, &seal(&data)) {
            tracing::debug!("the pipeline cache was not saved: {e}");
        }
    }
}

/// Writes a file anew, by way of another one, so that a reader never sees half of it.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let part = path.with_extension(format!("{}.part", std::process::id()));
    let written = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(&part, bytes))
        .and_then(|()| std::fs::rename(&part, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    written
}

const MAGIC: &[u8; 8] = b"qkvpipe1";

/// The data behind a magic number and a checksum.
fn seal(data: &[u8]) -> Vec<u8> {
    let mut file = MAGIC.to_vec();
    file.extend_from_slice(&checksum(data).to_le_bytes());
    file.extend_from_slice(data);
    file
}

fn unseal(file: Vec<u8>) -> Option<Vec<u8>> {
    let body = file.strip_prefix(MAGIC)?;
    let (sum, data) = body.split_first_chunk::<8>()?;
    (u64::from_le_bytes(*sum) == checksum(data)).then(|| data.to_vec())
}

/// FNV-1a, 64 bits.
pub(crate) fn checksum(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::{seal, unseal};

    #[test]
    fn a_sealed_cache_opens_and_a_damaged_one_does_not() {
        let sealed = seal(b"compiled kernels");
        assert_eq!(
            unseal(sealed.clone()).as_deref(),
            Some(&b"compiled kernels"[..])
        );
        assert_eq!(unseal(sealed[..sealed.len() - 1].to_vec()), None);
        let mut flipped = sealed;
        *flipped.last_mut().unwrap() ^= 1;
        assert_eq!(unseal(flipped), None);
        assert_eq!(unseal(Vec::new()), None);
    }
}
