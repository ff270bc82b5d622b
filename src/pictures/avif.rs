//! AVIF: one AV1 frame for the colours, one for alpha. The container is read by `avif-parse`, the frames by `rav1d`.
//!
//! rav1d is a port of a C decoder behind C functions: should it panic, the process ends. Who decodes what nobody has
//! decoded before does it in a process that may end (see [`super::decode`]'s users in `datasets`).

use avif_parse::{AV1Metadata, AvifData};
use image::{DynamicImage, ImageBuffer};
use re_rav1d::dav1d::{Decoder, Picture, PixelLayout, PlanarImageComponent, Settings, pixel};

use super::colour::Profile;
use super::heif::{self, Cicp};
use super::{DecodeLimits, Note, PictureError, Raw};

/// Numbers of ITU-T H.273.
const PQ: u8 = 16;
const HLG: u8 = 18;

/// Decodes the main picture.
pub fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<Raw, PictureError> {
    let file = AvifData::from_reader(&mut &*bytes).map_err(|error| match error {
        avif_parse::Error::UnexpectedEOF => PictureError::Truncated,
        error => damaged(error),
    })?;
    let metadata = file.primary_item_metadata().map_err(damaged)?;
    check(&metadata, limits)?;
    if let Some(alpha) = file.alpha_item_metadata().map_err(damaged)? {
        check(&alpha, limits)?;
    }
    let properties = heif::properties(bytes);
    let colours = frame(&file.primary_item, limits)?;
    let cicp = properties.cicp.unwrap_or_else(|| cicp_of(&colours));
    let planes = Planes::new(&colours)?;
    drop(colours);
    let alpha = match &file.alpha_item {
        Some(item) => {
            let alpha = Planes::new(&frame(item, limits)?)?;
            Some(Alpha::new(alpha, &planes, file.premultiplied_alpha)?)
        }
        None => None,
    };
    let mut notes = Vec::new();
    let profile = match properties.icc {
        Some(icc) => {
            let profile = Profile::from_icc(icc);
            if profile.is_none() {
                notes.push(Note::ProfileIgnored);
            }
            profile
        }
        None => Profile::from_cicp(cicp.primaries, cicp.transfer),
    };
    if properties.icc.is_none() && matches!(cicp.transfer, PQ | HLG) {
        notes.push(Note::HighDynamicRange);
    }
    Ok(Raw {
        picture: assemble(&planes, alpha.as_ref(), cicp)?,
        profile,
        orientation: properties.orientation(),
        notes,
    })
}

fn check(metadata: &AV1Metadata, limits: &DecodeLimits) -> Result<(), PictureError> {
    let size = (
        metadata.max_frame_width.get(),
        metadata.max_frame_height.get(),
    );
    // Planes as they are decoded, as they are kept, and the picture that is made of them.
    let sample = if metadata.bit_depth > 8 { 2 } else { 1 };
    limits.check(size, 3 * sample + 4 * 2 + 4 * sample)
}

fn damaged(error: impl ToString) -> PictureError {
    PictureError::Damaged(error.to_string())
}

/// Decodes the first frame of an item.
fn frame(item: &[u8], limits: &DecodeLimits) -> Result<Picture, PictureError> {
    const ATTEMPTS: usize = 16;
    let mut settings = Settings::new();
    settings.set_n_threads(1);
    settings.set_max_frame_delay(1);
    settings.set_all_layers(false);
    settings.set_frame_size_limit(u32::try_from(limits.pixels).unwrap_or(u32::MAX));
    let mut decoder = Decoder::with_settings(&settings).map_err(damaged)?;
    let mut sent = decoder.send_data(item.to_vec(), None, None, None);
    for _ in 0..ATTEMPTS {
        match decoder.get_picture() {
            Err(error) if error.is_again() => {}
            picture => return picture.map_err(damaged),
        }
        match sent {
            Err(error) if error.is_again() => sent = decoder.send_pending_data(),
            Err(error) => return Err(damaged(error)),
            Ok(()) => return Err(PictureError::Truncated),
        }
    }
    Err(damaged("it holds no frame"))
}

fn cicp_of(frame: &Picture) -> Cicp {
    Cicp {
        primaries: frame.color_primaries() as u8,
        transfer: frame.transfer_characteristic() as u8,
        matrix: frame.matrix_coefficients() as u8,
        full_range: frame.color_range() == pixel::YUVRange::Full,
    }
}

/// The samples of a frame.
struct Planes {
    bits: usize,
    width: usize,
    height: usize,
    layout: PixelLayout,
    is_full_range: bool,
    /// Luma, and where there are colours both of chroma.
    planes: Vec<Plane>,
    /// By which power of two chroma is smaller, across and down.
    chroma: (u32, u32),
}

struct Plane {
    samples: Vec<u16>,
    width: usize,
    height: usize,
}

impl Plane {
    fn new(frame: &Picture, component: PlanarImageComponent, width: usize, height: usize) -> Self {
        let bytes = frame.plane(component);
        let bytes: &[u8] = &bytes;
        let rows = bytes.chunks(frame.stride(component) as usize).take(height);
        let samples = if frame.bit_depth() > 8 {
            rows.flat_map(|row| row.as_chunks().0.iter().take(width))
                .map(|sample| u16::from_le_bytes(*sample))
                .collect()
        } else {
            rows.flat_map(|row| row.iter().take(width))
                .map(|sample| u16::from(*sample))
                .collect()
        };
        Self {
            samples,
            width,
            height,
        }
    }

    /// At the edges the next sample inside.
    fn at(&self, x: usize, y: usize) -> f32 {
        let (x, y) = (x.min(self.width - 1), y.min(self.height - 1));
        f32::from(self.samples[y * self.width + x])
    }

    /// Between the samples of a plane that is smaller than the picture: three parts of the nearer, one of the other.
    fn between(&self, x: usize, y: usize, (across, down): (u32, u32)) -> f32 {
        if (across, down) == (0, 0) {
            return self.at(x, y);
        }
        let neighbours = |at: usize, shift: u32| {
            let near = at >> shift;
            match (shift, at & 1) {
                (0, _) => (near, near),
                (_, 1) => (near, near + 1),
                _ => (near, near.saturating_sub(1)),
            }
        };
        let (near_x, far_x) = neighbours(x, across);
        let (near_y, far_y) = neighbours(y, down);
        let row = |y: usize| 0.75 * self.at(near_x, y) + 0.25 * self.at(far_x, y);
        0.75 * row(near_y) + 0.25 * row(far_y)
    }
}

impl Planes {
    fn new(frame: &Picture) -> Result<Self, PictureError> {
        let bits = frame
            .bits_per_component()
            .ok_or_else(|| damaged("its depth is unknown"))?;
        let (width, height) = (frame.width() as usize, frame.height() as usize);
        if width == 0 || height == 0 {
            return Err(damaged("it has no pixels"));
        }
        let layout = frame.pixel_layout();
        let chroma = match layout {
            PixelLayout::I400 | PixelLayout::I444 => (0, 0),
            PixelLayout::I420 => (1, 1),
            PixelLayout::I422 => (1, 0),
        };
        let mut planes = vec![Plane::new(frame, PlanarImageComponent::Y, width, height)];
        if layout != PixelLayout::I400 {
            let (across, down) = (
                width.div_ceil(1 << chroma.0),
                height.div_ceil(1 << chroma.1),
            );
            for component in [PlanarImageComponent::U, PlanarImageComponent::V] {
                planes.push(Plane::new(frame, component, across, down));
            }
        }
        Ok(Self {
            bits: bits.0,
            width,
            height,
            layout,
            is_full_range: frame.color_range() == pixel::YUVRange::Full,
            planes,
            chroma,
        })
    }

    /// Black and the distance to white, of luma; the middle and half the width, of chroma.
    fn range(&self, full: bool) -> Range {
        let unit = f32::from(1_u16 << (self.bits - 8));
        if full {
            let most = f32::from(1_u16 << (self.bits - 1)) * 2.0 - 1.0;
            let middle = f32::from(1_u16 << (self.bits - 1));
            Range {
                black: 0.0,
                luma: most,
                middle,
                chroma: most / 2.0,
            }
        } else {
            Range {
                black: 16.0 * unit,
                luma: 219.0 * unit,
                middle: 128.0 * unit,
                chroma: 112.0 * unit,
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Range {
    black: f32,
    luma: f32,
    middle: f32,
    chroma: f32,
}

/// The frame of alpha, whose luma is how opaque a pixel is.
struct Alpha {
    planes: Planes,
    range: Range,
    premultiplied: bool,
}

impl Alpha {
    fn new(planes: Planes, colours: &Planes, premultiplied: bool) -> Result<Self, PictureError> {
        if (planes.width, planes.height) != (colours.width, colours.height) {
            return Err(damaged("alpha has another size than the picture"));
        }
        Ok(Self {
            range: planes.range(planes.is_full_range),
            planes,
            premultiplied,
        })
    }

    fn at(&self, x: usize, y: usize) -> f32 {
        ((self.planes.planes[0].at(x, y) - self.range.black) / self.range.luma).clamp(0.0, 1.0)
    }
}

/// How luma and chroma become red, green and blue.
#[derive(Clone, Copy)]
enum Matrix {
    /// The planes are green, blue and red.
    Identity,
    YCgCo,
    /// By the weights of red and blue in luma; chroma is from -1 to 1.
    Weights(f32, f32),
}

impl Matrix {
    fn of(number: u8) -> Result<Self, PictureError> {
        match number {
            0 => Ok(Self::Identity),
            1 => Ok(Self::Weights(0.2126, 0.0722)),
            4 => Ok(Self::Weights(0.30, 0.11)),
            2 | 5 | 6 => Ok(Self::Weights(0.299, 0.114)), // unspecified, as libavif has it
            7 => Ok(Self::Weights(0.212, 0.087)),
            8 => Ok(Self::YCgCo),
            9 => Ok(Self::Weights(0.2627, 0.0593)),
            other => Err(damaged(format!("its colour matrix {other} is not known"))),
        }
    }

    fn rgb(self, [y, u, v]: [f32; 3]) -> [f32; 3] {
        match self {
            Self::Identity => [v, y, u],
            Self::YCgCo => {
                let t = y - u / 2.0;
                [t + v / 2.0, y + u / 2.0, t - v / 2.0]
            }
            Self::Weights(red, blue) => {
                let r = y + (1.0 - red) * v;
                let b = y + (1.0 - blue) * u;
                [r, (y - red * r - blue * b) / (1.0 - red - blue), b]
            }
        }
    }
}

/// Puts the samples together: 8 bits of 8, 16 of more.
fn assemble(
    planes: &Planes,
    alpha: Option<&Alpha>,
    cicp: Cicp,
) -> Result<DynamicImage, PictureError> {
    let matrix = Matrix::of(cicp.matrix)?;
    if matches!(matrix, Matrix::Identity)
        && planes.layout != PixelLayout::I444
        && planes.layout != PixelLayout::I400
    {
        return Err(damaged("its colour matrix does not go with its planes"));
    }
    let range = planes.range(cicp.full_range);
    let colour = |x: usize, y: usize| {
        let luma = |value: f32| (value - range.black) / range.luma;
        let [first, rest @ ..] = planes.planes.as_slice() else {
            return [0.0; 3];
        };
        let grey = luma(first.at(x, y));
        let [u, v] = rest else {
            return [grey; 3];
        };
        let [u, v] = [u, v].map(|plane| plane.between(x, y, planes.chroma));
        if let Matrix::Identity = matrix {
            return matrix.rgb([grey, luma(u), luma(v)]);
        }
        let signed = |value: f32| (value - range.middle) / range.chroma;
        matrix.rgb([grey, signed(u), signed(v)])
    };
    let pixel = |x: u32, y: u32| {
        let (x, y) = (x as usize, y as usize);
        let rgb = colour(x, y);
        let opaque = alpha.map_or(1.0, |alpha| alpha.at(x, y));
        let by = match alpha {
            Some(alpha) if alpha.premultiplied && opaque > 0.0 => 1.0 / opaque,
            _ => 1.0,
        };
        let [r, g, b] = rgb.map(|value| (value * by).clamp(0.0, 1.0));
        [r, g, b, opaque]
    };
    let (width, height) = (planes.width as u32, planes.height as u32); // they came from there
    let bytes = |value: f32| (value * 255.0 + 0.5) as u8;
    let words = |value: f32| (value * 65_535.0 + 0.5) as u16;
    let rgb = |[r, g, b, _]: [f32; 4]| [r, g, b];
    Ok(match (planes.bits > 8, alpha.is_some()) {
        (false, false) => ImageBuffer::from_fn(width, height, |x, y| {
            image::Rgb(rgb(pixel(x, y)).map(bytes))
        })
        .into(),
        (false, true) => {
            ImageBuffer::from_fn(width, height, |x, y| image::Rgba(pixel(x, y).map(bytes))).into()
        }
        (true, false) => ImageBuffer::from_fn(width, height, |x, y| {
            image::Rgb(rgb(pixel(x, y)).map(words))
        })
        .into(),
        (true, true) => {
            ImageBuffer::from_fn(width, height, |x, y| image::Rgba(pixel(x, y).map(words))).into()
        }
    })
}
