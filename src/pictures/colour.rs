//! From the colours of a file's profile to sRGB. A profile that is sRGB in all but name changes nothing.

use image::{DynamicImage, ImageBuffer, Luma, LumaA, Pixel, Rgb, Rgba};
use moxcms::{
    CicpColorPrimaries, CicpProfile, CmsError, ColorProfile, DataColorSpace, Layout,
    MatrixCoefficients, TransferCharacteristics, TransformExecutor, TransformOptions,
};

use super::Note;

/// What the numbers of a picture mean.
pub struct Profile(ColorProfile);

impl Profile {
    /// `None` when it cannot be read.
    pub fn from_icc(icc: &[u8]) -> Option<Self> {
        ColorProfile::new_from_slice(icc).ok().map(Self)
    }

    /// Primaries and transfer by their numbers in ITU-T H.273; `None` when they mean sRGB, or are not known.
    pub fn from_cicp(primaries: u8, transfer: u8) -> Option<Self> {
        // BT.709, BT.601 and BT.2020 curves are shown as sRGB's by browsers, and so by all who made the pictures.
        let is_srgb_curve = matches!(transfer, 1 | 2 | 6 | 13 | 14 | 15);
        if is_srgb_curve && matches!(primaries, 1 | 2) {
            return None;
        }
        let curve = if is_srgb_curve { 13 } else { transfer };
        let primaries = if primaries == 2 { 1 } else { primaries };
        let profile = ColorProfile::new_from_cicp(CicpProfile {
            color_primaries: CicpColorPrimaries::try_from(primaries).ok()?,
            transfer_characteristics: TransferCharacteristics::try_from(curve).ok()?,
            matrix_coefficients: MatrixCoefficients::Bt709,
            full_range: true,
        });
        profile.is_matrix_shaper().then_some(Self(profile))
    }

    fn is_grey(&self) -> bool {
        self.0.color_space == DataColorSpace::Gray
    }
}

/// Converts a picture; without one when there is nothing to convert, or no way to.
pub fn to_srgb(picture: DynamicImage, profile: &Profile) -> (DynamicImage, Option<Note>) {
    let is_grey = !picture.color().has_color();
    let fits = match profile.0.color_space {
        DataColorSpace::Gray => is_grey,
        // A decoder has made RGB of CMYK by then, and not by the profile.
        DataColorSpace::Rgb => true,
        _ => false,
    };
    if !fits {
        return (picture, Some(Note::ProfileIgnored));
    }
    match changes(profile) {
        Ok(false) => (picture, None),
        Ok(true) => {
            let picture = as_integers(picture, is_grey && !profile.is_grey());
            match convert(picture, profile) {
                Ok(picture) => (picture, Some(Note::ConvertedToSrgb)),
                Err((picture, _)) => (*picture, Some(Note::ProfileIgnored)),
            }
        }
        Err(_) => (picture, Some(Note::ProfileIgnored)),
    }
}

/// Floats as 16-bit numbers; greys as colours, where the profile is one of colours.
fn as_integers(picture: DynamicImage, in_colour: bool) -> DynamicImage {
    match picture {
        DynamicImage::ImageRgb32F(_) => picture.into_rgb16().into(),
        DynamicImage::ImageRgba32F(_) => picture.into_rgba16().into(),
        DynamicImage::ImageLuma8(_) if in_colour => picture.into_rgb8().into(),
        DynamicImage::ImageLumaA8(_) if in_colour => picture.into_rgba8().into(),
        DynamicImage::ImageLuma16(_) if in_colour => picture.into_rgb16().into(),
        DynamicImage::ImageLumaA16(_) if in_colour => picture.into_rgba16().into(),
        picture => picture,
    }
}

/// Whether the profile changes any colour by more than a step of rounding.
fn changes(profile: &Profile) -> Result<bool, CmsError> {
    const STEPS: usize = 9;
    let level = |step: usize| (step * 255 / (STEPS - 1)) as u8;
    let srgb = ColorProfile::new_srgb();
    let (layout, probe): (Layout, Vec<u8>) = if profile.is_grey() {
        (Layout::Gray, (0..=255).collect())
    } else {
        let cube = (0..STEPS.pow(3)).flat_map(|index| {
            [
                index / (STEPS * STEPS),
                index / STEPS % STEPS,
                index % STEPS,
            ]
            .map(level)
        });
        (Layout::Rgb, cube.collect())
    };
    let executor =
        profile
            .0
            .create_transform_8bit(layout, &srgb, Layout::Rgb, TransformOptions::default())?;
    let same = if profile.is_grey() {
        probe.iter().flat_map(|value| [*value; 3]).collect()
    } else {
        probe.clone()
    };
    let mut found = vec![0; same.len()];
    executor.transform(&probe, &mut found)?;
    Ok(same.iter().zip(&found).any(|(a, b)| a.abs_diff(*b) > 1))
}

/// On an error the picture as it was.
type Converted = Result<DynamicImage, (Box<DynamicImage>, CmsError)>;

fn convert(picture: DynamicImage, profile: &Profile) -> Converted {
    let srgb = ColorProfile::new_srgb();
    let options = TransformOptions::default();
    let eight = |from, to| profile.0.create_transform_8bit(from, &srgb, to, options);
    let sixteen = |from, to| profile.0.create_transform_16bit(from, &srgb, to, options);
    let back = |picture: DynamicImage| move |error| (Box::new(picture), error);
    let result = match &picture {
        DynamicImage::ImageRgb8(b) => eight(Layout::Rgb, Layout::Rgb)
            .and_then(|e| rows::<_, Rgb<u8>>(&*e, b).map(DynamicImage::ImageRgb8)),
        DynamicImage::ImageRgba8(b) => eight(Layout::Rgba, Layout::Rgba)
            .and_then(|e| rows::<_, Rgba<u8>>(&*e, b).map(DynamicImage::ImageRgba8)),
        DynamicImage::ImageLuma8(b) => eight(Layout::Gray, Layout::Rgb)
            .and_then(|e| rows::<Luma<u8>, Rgb<u8>>(&*e, b).map(DynamicImage::ImageRgb8)),
        DynamicImage::ImageLumaA8(b) => eight(Layout::GrayAlpha, Layout::Rgba)
            .and_then(|e| rows::<LumaA<u8>, Rgba<u8>>(&*e, b).map(DynamicImage::ImageRgba8)),
        DynamicImage::ImageRgb16(b) => sixteen(Layout::Rgb, Layout::Rgb)
            .and_then(|e| rows::<_, Rgb<u16>>(&*e, b).map(DynamicImage::ImageRgb16)),
        DynamicImage::ImageRgba16(b) => sixteen(Layout::Rgba, Layout::Rgba)
            .and_then(|e| rows::<_, Rgba<u16>>(&*e, b).map(DynamicImage::ImageRgba16)),
        DynamicImage::ImageLuma16(b) => sixteen(Layout::Gray, Layout::Rgb)
            .and_then(|e| rows::<Luma<u16>, Rgb<u16>>(&*e, b).map(DynamicImage::ImageRgb16)),
        DynamicImage::ImageLumaA16(b) => sixteen(Layout::GrayAlpha, Layout::Rgba)
            .and_then(|e| rows::<LumaA<u16>, Rgba<u16>>(&*e, b).map(DynamicImage::ImageRgba16)),
        _ => Err(CmsError::UnsupportedProfileConnection),
    };
    result.map_err(back(picture))
}

/// Row by row.
fn rows<P, Q>(
    executor: &dyn TransformExecutor<P::Subpixel>,
    from: &ImageBuffer<P, Vec<P::Subpixel>>,
) -> Result<ImageBuffer<Q, Vec<P::Subpixel>>, CmsError>
where
    P: Pixel<Subpixel: Default>,
    Q: Pixel<Subpixel = P::Subpixel>,
{
    let (width, height) = from.dimensions();
    let mut to = ImageBuffer::<Q, Vec<P::Subpixel>>::new(width, height);
    let length = |channels: u8| width as usize * usize::from(channels);
    let (taken, given) = (length(P::CHANNEL_COUNT), length(Q::CHANNEL_COUNT));
    for (from, to) in from.chunks_exact(taken).zip(to.chunks_exact_mut(given)) {
        executor.transform(from, to)?;
    }
    Ok(to)
}
