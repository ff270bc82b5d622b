//! What an upload may hold. The defaults are far above a real dataset and far below what hurts the machine.

/// Limits on one upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one request body.
    pub request_bytes: u64,
    /// Files in one request, and entries in one archive with those inside of it.
    pub files: usize,
    /// Bytes of one image file.
    pub image_bytes: u64,
    /// Width times height of one image.
    pub image_pixels: u64,
    /// Bytes of one caption file.
    pub caption_bytes: u64,
    /// Bytes of one `metadata.jsonl` or `metadata.csv`.
    pub table_bytes: u64,
    /// Bytes of one archive.
    pub archive_bytes: u64,
    /// Bytes of everything an archive unpacks to, those inside of it included.
    pub unpacked_bytes: u64,
    /// How deep archives may lie in archives; 1 is an archive without others.
    pub archive_depth: usize,
    /// Unpacked bytes per byte of archive, once more than [`Limits::RATIO_FREE_BYTES`] have been unpacked.
    pub unpacked_ratio: u64,
}

impl Limits {
    /// Flat pictures compress a thousandfold; up to here the ratio is not looked at.
    pub const RATIO_FREE_BYTES: u64 = 64 << 20;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_bytes: 32 << 30,
            files: 50_000,
            image_bytes: 128 << 20,
            image_pixels: 100_000_000,
            caption_bytes: 256 << 10,
            table_bytes: 64 << 20,
            archive_bytes: 32 << 30,
            unpacked_bytes: 64 << 30,
            archive_depth: 4,
            unpacked_ratio: 200,
        }
    }
}
