//! Enums and structs of the wire that have a twin behind it.

/// Conversions in both directions between two enums that differ in nothing but their side of the wire. Variants that
/// have two names are given as `Wire = Domain`, in a list of nothing but such pairs.
macro_rules! same_variants {
    ($wire:ty, $domain:ty: $($a:ident = $b:ident),+) => {
        impl From<$wire> for $domain {
            fn from(value: $wire) -> Self {
                match value { $(<$wire>::$a => Self::$b),+ }
            }
        }
        impl From<$domain> for $wire {
            fn from(value: $domain) -> Self {
                match value { $(<$domain>::$b => Self::$a),+ }
            }
        }
    };
    ($wire:ty, $domain:ty: $($name:ident),+) => {
        same_variants!($wire, $domain: $($name = $name),+);
    };
}
pub(super) use same_variants;

/// Conversions in both directions between two structs of the same fields.
macro_rules! same_fields {
    ($wire:ty, $domain:ty: $($field:ident),+) => {
        impl From<$wire> for $domain {
            fn from(value: $wire) -> Self {
                Self { $($field: value.$field),+ }
            }
        }
        impl From<$domain> for $wire {
            fn from(value: $domain) -> Self {
                Self { $($field: value.$field),+ }
            }
        }
    };
}
pub(super) use same_fields;
