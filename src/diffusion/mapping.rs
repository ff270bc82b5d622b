//! A file seen as memory. The only `unsafe` of the model code is here, behind two safe functions.

#![expect(
    unsafe_code,
    reason = "mapping a file is unsafe by nature; the two calls are argued below"
)]

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;

use memmap2::Mmap;

/// A read-only, private view of a whole file.
#[derive(Debug)]
pub struct MappedFile(Mmap);

impl MappedFile {
    /// Map a regular file. An empty one is an error of kind `InvalidData`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a file"));
        }
        if meta.len() == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the file is empty",
            ));
        }
        // SAFETY: the mapping is read-only and lives as long as the slice that `Deref` hands out. Another process
        // that writes to the file can change bytes under us: they are only ever copied as plain numbers (no
        // reference to them outlives the copy, no layout is read from them after validation), so that gives other
        // weights, not undefined control flow. Truncation raises SIGBUS, which ends this process; a run is a process
        // of its own for such reasons, and the service keeps model files immutable.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self(map))
    }

    /// Tell the kernel that these bytes are not needed any more, so that a loaded model is not counted twice.
    /// A hint: it never fails, and the bytes can be read again (from the file).
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            let len = range.end.saturating_sub(range.start);
            if range.end > self.0.len() || len == 0 {
                return;
            }
            // SAFETY: the range lies inside the mapping. `DontNeed` may replace the content of private *anonymous*
            // or *modified* pages by zeros; this mapping is file-backed and never written, so its pages come back
            // from the file unchanged.
            let outcome = unsafe {
                self.0
                    .unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, len)
            };
            if let Err(error) = outcome {
                tracing::trace!(%error, "the kernel did not take the hint to drop mapped pages");
            }
        }
        #[cfg(not(unix))]
        drop(range);
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
