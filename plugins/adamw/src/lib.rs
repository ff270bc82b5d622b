//! Plugin workspace member `adamw`.
