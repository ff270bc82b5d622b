//! Formats, colours, alpha, limits and damage, with pictures that are made here.

use std::io::Cursor;

use image::{DynamicImage, GrayImage, Luma, Rgb, RgbImage, Rgba, RgbaImage};
use moxcms::ColorProfile;

use super::*;

fn picture() -> RgbImage {
    RgbImage::from_fn(40, 30, |x, y| {
        Rgb([(x * 6) as u8, (y * 8) as u8, (x * y % 251) as u8])
    })
}

fn encoded(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).expect("an encoder");
    bytes.into_inner()
}

fn decoded(bytes: &[u8]) -> Decoded {
    decode(bytes, &DecodeLimits::default()).expect("a whole picture")
}

const FORMATS: [ImageFormat; 6] = [
    ImageFormat::Png,
    ImageFormat::Jpeg,
    ImageFormat::WebP,
    ImageFormat::Bmp,
    ImageFormat::Gif,
    ImageFormat::Tiff,
];

fn all_formats() -> impl Iterator<Item = (ImageFormat, Vec<u8>)> {
    let picture = DynamicImage::from(picture());
    FORMATS
        .map(|format| (format, encoded(&picture, format)))
        .into_iter()
}

/// A JPEG with a segment after its start.
fn with_segment(jpeg: &[u8], marker: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = jpeg[..2].to_vec();
    bytes.extend([0xff, marker]);
    bytes.extend(((content.len() + 2) as u16).to_be_bytes());
    bytes.extend(content);
    bytes.extend(&jpeg[2..]);
    bytes
}

#[test]
fn whole_pictures_are_decoded() {
    for (format, bytes) in all_formats() {
        let found = decoded(&bytes);
        assert_eq!(found.rgb.dimensions(), (40, 30), "{format:?}");
        assert_eq!(found.format.in_image(), Some(format));
        assert!(
            found.alpha.is_none() && found.notes.is_empty(),
            "{format:?}"
        );
        if !matches!(format, ImageFormat::Jpeg | ImageFormat::Gif) {
            assert_eq!(found.rgb, picture(), "{format:?}");
        }
    }
}

#[test]
fn cut_pictures_are_refused() {
    for (format, bytes) in all_formats() {
        for keep in [bytes.len() / 4, bytes.len() / 2, bytes.len() * 9 / 10] {
            let error = decode(&bytes[..keep], &DecodeLimits::default()).expect_err("a cut one");
            assert!(
                matches!(error, PictureError::Truncated | PictureError::Damaged(_)),
                "{format:?}: {error}"
            );
        }
    }
    let jpeg = encoded(&picture().into(), ImageFormat::Jpeg);
    let cut = decode(&jpeg[..jpeg.len() - 2], &DecodeLimits::default());
    assert_eq!(cut, Err(PictureError::Truncated));
}

#[test]
fn what_is_no_picture_or_too_large_is_refused() {
    for bytes in [b"".as_slice(), b"hello", b"\x89PN", b"%PDF-1.7"] {
        let refused = decode(bytes, &DecodeLimits::default());
        assert_eq!(refused, Err(PictureError::NotAnImage), "{bytes:?}");
    }
    let few = DecodeLimits {
        pixels: 1000,
        ..DecodeLimits::default()
    };
    let little = DecodeLimits {
        memory_bytes: 5000,
        ..DecodeLimits::default()
    };
    for (format, bytes) in all_formats() {
        for limits in [few, little] {
            let error = decode(&bytes, &limits).expect_err("too large");
            assert_eq!(error.code(), "too_many_pixels", "{format:?}: {error}");
        }
    }
}

/// A few bytes that say they are a gigantic picture.
#[test]
fn a_bomb_is_refused_before_it_is_unpacked() {
    let mut png = encoded(&picture().into(), ImageFormat::Png);
    png[16..24].copy_from_slice(&[0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff]);
    let checksum = crc32fast::hash(&png[12..29]);
    png[29..33].copy_from_slice(&checksum.to_be_bytes());
    let mut bmp = encoded(&picture().into(), ImageFormat::Bmp);
    bmp[18..26].copy_from_slice(&[0xff, 0x7f, 0, 0, 0xff, 0x7f, 0, 0]);
    let mut gif = encoded(&picture().into(), ImageFormat::Gif);
    gif[6..10].fill(0xff);
    let mut webp = encoded(&picture().into(), ImageFormat::WebP);
    assert_eq!(&webp[12..16], b"VP8L");
    webp[21..24].copy_from_slice(&[0xfe, 0xbf, 0xff]); // 14 bits of width, 14 of height
    webp[24] |= 0x0f;
    let mut tiff = encoded(&picture().into(), ImageFormat::Tiff);
    let directory = u32::from_le_bytes(tiff[4..8].try_into().expect("four")) as usize;
    for entry in tiff[directory + 2..].chunks_mut(12).take(10) {
        if matches!(entry[..2], [0 | 1 | 0x16, 1]) {
            entry[2..4].copy_from_slice(&[4, 0]); // width, height and the rows of the one strip, as 32-bit numbers
            entry[8..12].copy_from_slice(&[0, 0, 1, 0]);
        }
    }
    for bomb in [png, bmp, gif, webp, tiff] {
        let error = decode(&bomb, &DecodeLimits::default()).expect_err("a bomb");
        assert_eq!(error.code(), "too_many_pixels", "{:?}: {error}", &bomb[..4]);
    }
}

#[test]
fn exif_turns_a_picture() {
    let jpeg = encoded(&picture().into(), ImageFormat::Jpeg);
    let upright = decoded(&jpeg).rgb;
    // orientation 6: to be turned by 90 degrees with the clock
    let exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    let turned = decoded(&with_segment(&jpeg, 0xe1, exif)).rgb;
    assert_eq!(turned, image::imageops::rotate90(&upright));
}

#[test]
fn greys_and_16_bits_become_8_bit_colours() {
    let grey: GrayImage = image::ImageBuffer::from_pixel(8, 8, Luma([200_u8]));
    let deep = image::ImageBuffer::from_pixel(8, 8, Luma([200_u16 * 257]));
    let colours = image::ImageBuffer::from_pixel(8, 8, Rgb([200_u16 * 257 + 100; 3]));
    for picture in [
        DynamicImage::ImageLuma8(grey),
        DynamicImage::ImageLuma16(deep),
        DynamicImage::ImageRgb16(colours),
    ] {
        for format in [ImageFormat::Png, ImageFormat::Tiff] {
            let found = decoded(&encoded(&picture, format)).rgb;
            assert!(found.pixels().all(|pixel| pixel.0 == [200; 3]));
        }
    }
}

#[test]
fn alpha_is_kept_apart_and_can_be_laid_on_a_colour() {
    let glass = RgbaImage::from_fn(2, 1, |x, _| {
        Rgba([255, 0, 51, if x == 0 { 255 } else { 51 }])
    });
    let bytes = encoded(&glass.into(), ImageFormat::Png);
    let found = decoded(&bytes);
    let alpha = found.alpha.clone().expect("alpha");
    assert_eq!(alpha.as_raw(), &[255, 51]);
    let dropped = found.clone().flatten(None);
    assert_eq!(dropped.as_raw(), &[255, 0, 51, 255, 0, 51]);
    let laid = found.flatten(Some("#00ff00".parse().expect("a colour")));
    assert_eq!(laid.as_raw(), &[255, 0, 51, 51, 204, 10]);
    for wrong in ["", "00ff00", "#0f0", "#00ff0g", "#00ff0000"] {
        assert_eq!(wrong.parse::<Background>(), Err(BackgroundError));
    }
    let opaque = RgbaImage::from_pixel(2, 1, Rgba([1, 2, 3, 255]));
    assert!(
        decoded(&encoded(&opaque.into(), ImageFormat::Png))
            .alpha
            .is_none()
    );
}

fn with_profile(profile: &[u8]) -> Vec<u8> {
    let jpeg = encoded(&picture().into(), ImageFormat::Jpeg);
    let content = [b"ICC_PROFILE\0\x01\x01".as_slice(), profile].concat();
    with_segment(&jpeg, 0xe2, &content)
}

#[test]
fn profiles_are_converted_to_srgb() {
    let plain = decoded(&encoded(&picture().into(), ImageFormat::Jpeg)).rgb;
    let icc = |profile: ColorProfile| profile.encode().expect("a profile");
    let same = decoded(&with_profile(&icc(ColorProfile::new_srgb())));
    assert_eq!((&same.rgb, same.notes.as_slice()), (&plain, &[][..]));
    let wide = decoded(&with_profile(&icc(ColorProfile::new_display_p3())));
    assert_eq!(wide.notes, [Note::ConvertedToSrgb]);
    assert_ne!(wide.rgb, plain);
    let grey = decoded(&with_profile(&icc(ColorProfile::new_gray_with_gamma(2.2))));
    assert_eq!(grey.notes, [Note::ProfileIgnored]);
    let broken = decoded(&with_profile(b"no profile"));
    assert_eq!(
        (&broken.rgb, broken.notes.as_slice()),
        (&plain, &[Note::ProfileIgnored][..])
    );
}

/// Pure colours of Display P3, by the published matrices: what is outside of sRGB is clipped.
#[test]
fn display_p3_gives_the_known_numbers() {
    let profile = ColorProfile::new_display_p3().encode().expect("a profile");
    for (from, expected) in [
        ([128, 128, 128], [128, 128, 128]),
        ([200, 100, 50], [215, 93, 31]),
        ([30, 200, 90], [0, 204, 73]),
        ([255, 255, 255], [255, 255, 255]),
    ] {
        let flat = DynamicImage::from(RgbImage::from_pixel(4, 4, Rgb(from)));
        let profile = colour::Profile::from_icc(&profile).expect("readable");
        let (found, _) = colour::to_srgb(flat, &profile);
        let found = found.into_rgb8().get_pixel(0, 0).0;
        let near = found.iter().zip(expected).all(|(a, b)| a.abs_diff(b) <= 1);
        assert!(near, "{from:?}: {found:?}, expected {expected:?}");
    }
}

#[test]
fn what_follows_a_picture_is_told() {
    for format in [
        ImageFormat::Png,
        ImageFormat::Jpeg,
        ImageFormat::WebP,
        ImageFormat::Gif,
    ] {
        let mut bytes = encoded(&picture().into(), format);
        bytes.extend(b"PK\x03\x04 a zip, perhaps");
        assert_eq!(decoded(&bytes).notes, [Note::TrailingBytes], "{format:?}");
    }
}

#[test]
fn the_first_of_several_pictures_is_used() {
    let mut bytes = Vec::new();
    let mut encoder = image::codecs::gif::GifEncoder::new(&mut bytes);
    for shade in [10, 200] {
        let frame = RgbaImage::from_pixel(4, 4, Rgba([shade, shade, shade, 255]));
        encoder
            .encode_frame(image::Frame::new(frame))
            .expect("a frame");
    }
    drop(encoder);
    let found = decoded(&bytes);
    assert_eq!(found.notes, [Note::OnlyFirstFrame]);
    assert!(found.rgb.pixels().all(|pixel| pixel.0 == [10; 3]));
}

fn avif(name: &str) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/avif");
    std::fs::read(format!("{folder}/{name}")).expect("a fixture")
}

/// Largest and mean difference of two pictures' samples.
fn difference(a: &[u8], b: &[u8]) -> (u8, f64) {
    assert_eq!(a.len(), b.len());
    let each = || a.iter().zip(b).map(|(a, b)| a.abs_diff(*b));
    let sum: f64 = each().map(f64::from).sum();
    (each().max().unwrap_or_default(), sum / a.len() as f64)
}

/// Next to libavif, by way of Pillow (tests/fixtures/avif/make.py). Both decode AV1 to the same samples; libavif's
/// colours come of fixed-point coefficients in 64ths, which is up to 2 steps, and up to 4 where it also has to find
/// chroma between samples.
#[test]
fn avif_gives_what_libavif_gives() {
    for (name, most) in [
        ("444", 2),
        ("grey", 0),
        ("alpha", 2),
        ("422", 4),
        ("420", 4),
    ] {
        let found = decoded(&avif(&format!("{name}.avif")));
        assert_eq!(found.format, Format::Avif);
        let expected = image::load_from_memory(&avif(&format!("{name}.png"))).expect("a PNG");
        let (largest, mean) = difference(&found.rgb, expected.to_rgb8().as_raw());
        assert!(largest <= most && mean < 0.5, "{name}: {largest}, {mean}");
        if name == "alpha" {
            let alpha: Vec<u8> = expected.to_rgba8().pixels().map(|p| p.0[3]).collect();
            let (largest, _) = difference(&found.alpha.expect("alpha"), &alpha);
            assert_eq!(largest, 0);
        } else {
            assert!(found.alpha.is_none(), "{name}");
        }
    }
}

/// Where nothing was lost but by rounding to luma and chroma, the picture that was encoded comes out.
#[test]
fn avif_of_full_quality_gives_its_source() {
    let source = decoded(&avif("source.png")).rgb;
    for name in ["full", "limited"] {
        let found = decoded(&avif(&format!("{name}.avif"))).rgb;
        let theirs = decoded(&avif(&format!("{name}.png"))).rgb;
        let (largest, mean) = difference(&found, &source);
        let (their_largest, their_mean) = difference(&theirs, &source);
        assert!(
            largest <= their_largest && mean <= their_mean,
            "{name}: {largest}, {mean}; libavif {their_largest}, {their_mean}"
        );
        assert!(largest <= 3, "{name}: {largest}"); // of two roundings of chroma, times up to 1.8
    }
}

#[test]
fn avif_is_turned_as_its_container_says() {
    let source = RgbImage::from(decoded(&avif("444.avif")).rgb);
    for exif in 2..=8 {
        let found = decoded(&avif(&format!("turned-{exif}.avif"))).rgb;
        let mut expected = DynamicImage::from(source.clone());
        expected.apply_orientation(Orientation::from_exif(exif).expect("a turn"));
        assert_eq!(
            found.dimensions(),
            (expected.width(), expected.height()),
            "{exif}"
        );
        let (_, mean) = difference(&found, expected.to_rgb8().as_raw());
        assert!(mean < 6.0, "{exif}: {mean}"); // of quality 60; another turn differs by 30 and more
    }
}

#[test]
fn damaged_avif_is_refused() {
    let whole = avif("alpha.avif");
    for keep in [20, whole.len() / 4, whole.len() / 2, whole.len() - 30] {
        let error = decode(&whole[..keep], &DecodeLimits::default()).expect_err("a cut one");
        assert!(
            matches!(error, PictureError::Truncated | PictureError::Damaged(_)),
            "{keep}: {error}"
        );
    }
    let few = DecodeLimits {
        pixels: 1000,
        ..DecodeLimits::default()
    };
    let error = decode(&whole, &few).expect_err("too large");
    assert_eq!(error.code(), "too_many_pixels");
}
