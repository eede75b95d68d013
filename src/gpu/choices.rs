//! What was measured to be best on a device, by key: text to text, kept in a file of the user's cache
//! directory. What the texts mean is not known here.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::pipeline_cache::checksum;
use super::{Gpu, build, lock};
use crate::{Error, Result};

/// Choices by key.
type Table = BTreeMap<String, String>;

/// What was measured, in memory and in the file.
#[derive(Default)]
pub(super) struct Choices {
    table: Mutex<Table>,
    file: Option<ChoicesFile>,
}

struct ChoicesFile {
    path: PathBuf,
    /// What the choices hold for: a file that begins otherwise is another program's or driver's.
    header: String,
}

impl Choices {
    /// The choices saved for that adapter.
    pub fn open(info: &wgpu::AdapterInfo) -> Choices {
        let Some(folder) = dirs::cache_dir() else {
            return Choices::default();
        };
        let file = ChoicesFile {
            path: folder.join("qkv").join(file_name(info)),
            header: header(info),
        };
        Choices {
            table: Mutex::new(file.read().unwrap_or_default()),
            file: Some(file),
        }
    }

    /// The same choices in memory alone.
    pub fn copied(&self) -> Choices {
        Choices {
            table: Mutex::new(lock(&self.table).clone()),
            file: None,
        }
    }
}

impl Gpu {
    /// What was measured to be best under that key, on this device or one of the same name, driver and
    /// backend.
    pub fn choice(&self, key: &str) -> Option<String> {
        lock(&self.0.choices.table).get(key).cloned()
    }

    /// Whether nothing was measured.
    pub(crate) fn has_no_choices(&self) -> bool {
        lock(&self.0.choices.table).is_empty()
    }

    /// Keeps choices, which take the place of older ones under their keys, and saves them where
    /// [`Gpu::choices_path`] says. What other processes saved meanwhile is kept.
    ///
    /// # Errors
    /// [`Error::File`] where the file cannot be written; the choices hold for this device all the same.
    pub fn keep_choices(&self, choices: &BTreeMap<String, String>) -> Result<()> {
        let choices = choices
            .iter()
            .map(|(key, choice)| (key.clone(), choice.clone()));
        let choices: Table = choices.collect();
        lock(&self.0.choices.table).extend(choices.clone());
        match &self.0.choices.file {
            Some(file) => file.add(choices).map_err(|e| Error::file(&file.path, e)),
            None => Ok(()),
        }
    }

    /// The file that choices are saved in. There is none on a device of the caller's, on a narrowed one, and
    /// where the user has no cache directory.
    pub fn choices_path(&self) -> Option<&Path> {
        self.0.choices.file.as_ref().map(|file| file.path.as_path())
    }

    /// This device by tables of capabilities alone: it and its clones forget what was measured. The file is
    /// left as it is.
    pub fn untuned(self) -> Gpu {
        lock(&self.0.choices.table).clear();
        self
    }
}

/// Of an adapter, whatever its driver. Metal numbers neither vendors nor devices: the names tell them apart.
fn file_name(info: &wgpu::AdapterInfo) -> String {
    format!(
        "tuned-{:x}-{:x}-{:016x}-{}",
        info.vendor,
        info.device,
        checksum(info.name.as_bytes()),
        info.backend
    )
}

/// A line for each thing that a measurement depends on.
fn header(info: &wgpu::AdapterInfo) -> String {
    format!(
        "{}adapter {}\ndriver {} {}\nbackend {}\n",
        build(),
        info.name,
        info.driver,
        info.driver_info,
        info.backend
    )
}

impl ChoicesFile {
    /// What the file holds; `None` where it is absent, damaged, or not for this program, device and driver.
    fn read(&self) -> Option<Table> {
        let text = std::fs::read_to_string(&self.path).ok()?;
        let body = text.strip_prefix(&self.header)?;
        let (sum, lines) = body.strip_prefix("checksum ")?.split_once('\n')?;
        if sum != format!("{:016x}", checksum(lines.as_bytes())) {
            return None;
        }
        let pairs = lines.lines().map(|line| {
            let (key, choice) = line.split_once(" = ")?;
            Some((key.to_string(), choice.to_string()))
        });
        pairs.collect()
    }

    /// Adds to what the file holds by then. Writers take turns by a lock on a file beside it, and write by
    /// way of another one, so that a reader never sees half of it.
    fn add(&self, choices: Table) -> std::io::Result<()> {
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let turn = File::create(self.path.with_extension("lock"))?;
        turn.lock()?;
        let mut table = self.read().unwrap_or_default();
        table.extend(choices);
        let lines = table
            .iter()
            .map(|(key, choice)| format!("{key} = {choice}\n"));
        let lines: String = lines.collect();
        let sum = checksum(lines.as_bytes());
        let part = self.path.with_extension("part");
        std::fs::write(
            &part,
            format!("{}checksum {sum:016x}\n{lines}", self.header),
        )?;
        std::fs::rename(&part, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(folder: &tempfile::TempDir, header: &str) -> ChoicesFile {
        ChoicesFile {
            path: folder.path().join("below").join("tuned-1-2-vulkan"),
            header: header.into(),
        }
    }

    fn table(pairs: &[(&str, &str)]) -> Table {
        let pairs = pairs.iter().map(|&(k, v)| (k.to_string(), v.to_string()));
        pairs.collect()
    }

    #[test]
    fn what_was_saved_is_read_and_added_to() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(&folder, "qkv 1\ndriver a\n");
        assert_eq!(file.read(), None);
        file.add(table(&[("a b", "1 = 2"), ("c", "3")])).unwrap();
        file.add(table(&[("c", "4"), ("d", "5; 6")])).unwrap();
        let all = table(&[("a b", "1 = 2"), ("c", "4"), ("d", "5; 6")]);
        assert_eq!(file.read(), Some(all));
    }

    #[test]
    fn a_damaged_file_and_another_drivers_are_ignored_and_written_anew() {
        let folder = tempfile::tempdir().unwrap();
        let ours = file(&folder, "qkv 1\ndriver a\n");
        ours.add(table(&[("key", "choice"), ("other", "x")]))
            .unwrap();
        let whole = std::fs::read(&ours.path).unwrap();
        // Every byte of it counts, and so does its length.
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            std::fs::write(&ours.path, &flipped).unwrap();
            assert_eq!(ours.read(), None, "byte {at}");
            std::fs::write(&ours.path, &whole[..at]).unwrap();
            assert_eq!(ours.read(), None, "{at} bytes");
        }
        std::fs::write(&ours.path, b"\xff\xfe").unwrap();
        assert_eq!(ours.read(), None);
        ours.add(table(&[("new", "y")])).unwrap();
        assert_eq!(ours.read(), Some(table(&[("new", "y")])));
        let theirs = file(&folder, "qkv 1\ndriver b\n");
        assert_eq!(theirs.read(), None);
        theirs.add(table(&[("z", "z")])).unwrap();
        assert_eq!(
            (theirs.read(), ours.read()),
            (Some(table(&[("z", "z")])), None)
        );
    }

    #[test]
    fn writers_at_once_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(&folder, "qkv 1\n");
        // Each opens the lock's file anew, as processes do.
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let file = &file;
                scope.spawn(move || {
                    for n in 0..25 {
                        let key = format!("{writer} {n}");
                        file.add(table(&[(&key, "x")])).unwrap();
                    }
                });
            }
        });
        assert_eq!(file.read().unwrap().len(), 100);
    }

    #[test]
    fn the_header_names_what_a_measurement_depends_on() {
        let info = |name: &str, driver: &str, backend| wgpu::AdapterInfo {
            name: name.into(),
            driver: driver.into(),
            ..wgpu::AdapterInfo::new(wgpu::DeviceType::Cpu, backend)
        };
        let ours = header(&info("a", "b", wgpu::Backend::Vulkan));
        for word in [&build(), "adapter a\n", "driver b "] {
            assert!(ours.contains(word), "{ours}");
        }
        for other in [
            info("other", "b", wgpu::Backend::Vulkan),
            info("a", "other", wgpu::Backend::Vulkan),
            info("a", "b", wgpu::Backend::Metal),
        ] {
            assert_ne!(header(&other), ours);
        }
    }

    #[test]
    fn each_adapter_has_a_file_of_its_own() {
        let of = |name: &str, backend| {
            file_name(&wgpu::AdapterInfo {
                name: name.into(),
                ..wgpu::AdapterInfo::new(wgpu::DeviceType::Cpu, backend)
            })
        };
        let ours = of("a", wgpu::Backend::Metal);
        assert_eq!(of("a", wgpu::Backend::Metal), ours);
        assert_ne!(of("b", wgpu::Backend::Metal), ours);
        assert_ne!(of("a", wgpu::Backend::Vulkan), ours);
    }
}
