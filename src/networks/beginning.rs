//! What a LoRA file says of a run that begins with it, told without loading a model.

use std::collections::HashMap;
use std::path::Path;

use crate::diffusion::Footprint;
use crate::networks::NetworkError;
use crate::networks::form::Form;
use crate::networks::format::LoraFile;
use crate::networks::reading::{KnownLayer, group_by_adapter};
use crate::networks::settings::{NetworkKind, NetworkSettings, TrainParts};
use crate::networks::targets::{Naming, Target, layers};

/// The adapters of a file, for a model that is not loaded; without those of the halves that are not trained.
///
/// # Errors
/// Those of [`LoraNetwork::load`](crate::networks::LoraNetwork::load).
pub fn targets_of_file(
    path: &Path,
    model: &Footprint,
    parts: TrainParts,
) -> Result<Vec<Target>, NetworkError> {
    let naming = Naming::of_footprint(model);
    let both = TrainParts {
        unet: true,
        text_encoder: true,
    };
    let known = layers(model, both).into_iter().map(|layer| {
        let name = naming.lora_name(layer.part, &layer.path);
        let shape = naming.shape_in_files(layer.part, &layer.path, layer.shape);
        let known = KnownLayer {
            part: layer.part,
            path: layer.path,
            shape,
        };
        (name, known)
    });
    let mut known: HashMap<String, KnownLayer> = known.collect();
    let groups = group_by_adapter(LoraFile::outline(path)?.tensors, &known)?;
    let mut targets = Vec::new();
    for (name, tensors) in groups {
        let Some(layer) = known.remove(&name) else {
            continue;
        };
        let (target, _) = tensors.into_adapter(&name, layer)?;
        if parts.has(target.part) {
            targets.push(target);
        }
    }
    if targets.is_empty() {
        return Err(NetworkError::NoTargets);
    }
    targets.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(targets)
}

/// Takes kind, ranks and alphas from a file's adapters: those that most of them have.
pub fn take_sizes(settings: &mut NetworkSettings, targets: &[Target]) {
    let most = |wide: bool| {
        let mut counts: HashMap<(usize, u64), usize> = HashMap::new();
        let own = targets.iter().filter(|t| t.shape.is_wide_conv() == wide);
        for target in own {
            let size = (target.rank, target.alpha.to_bits());
            *counts.entry(size).or_default() += 1;
        }
        let found = counts
            .into_iter()
            .max_by_key(|(size, count)| (*count, *size));
        found.map(|((rank, alpha), _)| (rank, f64::from_bits(alpha)))
    };
    let (linear, conv) = (most(false), most(true));
    let any = |is: fn(&Target) -> bool| targets.iter().any(is);
    settings.kind = match targets.first().map(|target| target.form) {
        Some(Form::Hadamard { .. }) => NetworkKind::Loha,
        Some(Form::Kronecker(_)) => NetworkKind::Lokr,
        Some(Form::Scale { .. }) => NetworkKind::Ia3,
        _ if conv.is_some() => NetworkKind::Locon,
        _ => NetworkKind::Lora,
    };
    if let Some((rank, alpha)) = linear.or(conv) {
        (settings.rank, settings.alpha) = (rank, alpha);
    }
    let conv = conv.filter(|_| settings.kind != NetworkKind::Ia3);
    settings.preset = settings
        .preset
        .filter(|preset| preset.has_convolutions() || conv.is_none());
    let has_conv = settings.conv().is_some();
    settings.conv_rank = conv.filter(|_| has_conv).map(|(rank, _)| rank);
    settings.conv_alpha = conv.filter(|_| has_conv).map(|(_, alpha)| alpha);
    settings.dora = any(|target| target.dora);
    settings.tucker = has_conv && any(|target| target.form.has_core());
    let whole = any(|target| target.form.is_unscaled());
    let both = any(|t| matches!(t.form, Form::Kronecker(form) if form.left_is_product));
    settings.decompose_both = both;
    settings.full_matrix = whole && !both;
    settings.factor = None;
}

/// Refuses adapters of a file that are not those of the settings.
pub fn compare<'a>(
    found: impl Iterator<Item = &'a Target>,
    expected: impl Iterator<Item = Target>,
) -> Result<(), NetworkError> {
    let mut found: HashMap<&str, &Target> =
        found.map(|target| (target.name.as_str(), target)).collect();
    for expected in expected {
        let Some(found) = found.remove(expected.name.as_str()) else {
            let message = format!("has no adapter {}", expected.name);
            return Err(NetworkError::OtherAdapters { message });
        };
        let told = |target: &Target| {
            let form = (target.form, target.dora);
            // Whole matrices tell no rank, and files may hold alpha in half precision.
            let scaled = !target.form.is_unscaled() && target.form.has_alpha();
            let size = scaled.then(|| (target.rank, (target.alpha * 1e3).round()));
            (form, size)
        };
        if told(found) != told(&expected) {
            let message = format!(
                "{}: the file has {}, the settings {}",
                expected.name,
                words(found),
                words(&expected)
            );
            return Err(NetworkError::OtherAdapters { message });
        }
    }
    match found.keys().min() {
        Some(name) => Err(NetworkError::OtherAdapters {
            message: format!("has an adapter {name}, the settings have none there"),
        }),
        None => Ok(()),
    }
}

fn words(target: &Target) -> String {
    let form = match target.form {
        Form::LowRank { .. } => "lora",
        Form::Hadamard { .. } => "loha",
        Form::Kronecker(_) => "lokr",
        Form::Scale { .. } => "ia3",
    };
    let shapes: Vec<String> = target
        .tensors()
        .iter()
        .map(|spec| format!("{} {:?}", spec.suffix, spec.shape))
        .collect();
    format!(
        "{form} of rank {}, alpha {} ({})",
        target.rank,
        target.alpha,
        shapes.join(", ")
    )
}
