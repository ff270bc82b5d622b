//! The one table of problem codes. A code is part of the API: it is never renamed and never reused.

use actix_web::http::StatusCode;

macro_rules! codes {
    ($($variant:ident = $code:literal, $status:literal, $title:literal;)*) => {
        /// What went wrong, as a stable word a program can branch on.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code { $(#[doc = $title] $variant,)* }

        impl Code {
            /// Every code, in the order of the table.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// The word on the wire.
            pub const fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $code,)* }
            }

            /// The short text that is the same for every occurrence.
            pub const fn title(self) -> &'static str {
                match self { $(Code::$variant => $title,)* }
            }

            const fn status_number(self) -> u16 {
                match self { $(Code::$variant => $status,)* }
            }
        }
    };
}

codes! {
    // requests
    MalformedJson = "malformed_json", 400, "The body is not JSON";
    MalformedMultipart = "malformed_multipart", 400, "The body is not a complete multipart form";
    MalformedBody = "malformed_body", 400, "The body could not be read";
    InvalidHeader = "invalid_header", 400, "A header has no usable value";
    Unauthorized = "unauthorized", 401, "An API key is needed";
    MissingScope = "missing_scope", 403, "The API key does not allow this";
    HostRefused = "host_refused", 403, "The service is not known under this name";
    OriginRefused = "origin_refused", 403, "This web page may not call the service";
    NotFound = "not_found", 404, "There is nothing at this address";
    MethodNotAllowed = "method_not_allowed", 405, "The resource does not know this method";
    NotAcceptable = "not_acceptable", 406, "The answer cannot be given in the wanted form";
    RequestTimeout = "request_timeout", 408, "The request did not arrive in time";
    PreconditionFailed = "precondition_failed", 412, "The resource has changed";
    PayloadTooLarge = "payload_too_large", 413, "The request is larger than the limit";
    UnsupportedMediaType = "unsupported_media_type", 415, "The content type is not understood here";
    RangeNotSatisfiable = "range_not_satisfiable", 416, "The range lies outside of the file";
    InvalidBody = "invalid_body", 422, "The body does not have the expected fields";
    InvalidQuery = "invalid_query", 422, "A query parameter has no usable value";
    InvalidCursor = "invalid_cursor", 422, "The cursor was not given out by this list";
    BadRequest = "bad_request", 400, "The request could not be understood";

    // idempotency
    IdempotencyKeyReused = "idempotency_key_reused", 422, "The idempotency key was used with another request";
    IdempotencyKeyInUse = "idempotency_key_in_use", 409, "The first request with this idempotency key is still running";

    // datasets
    DatasetNotFound = "dataset_not_found", 404, "There is no such dataset";
    DatasetInUse = "dataset_in_use", 409, "A run uses the dataset";
    SubsetNotFound = "subset_not_found", 404, "There is no such subset";
    ImageNotFound = "image_not_found", 404, "There is no such image";
    MaskNotFound = "mask_not_found", 404, "The image has no mask";
    InvalidMask = "invalid_mask", 422, "The picture cannot be the image's mask";
    InvalidDataset = "invalid_dataset", 422, "The dataset's description has a wrong value";
    InvalidSubset = "invalid_subset", 422, "The subset's description has a wrong value";
    InvalidCaption = "invalid_caption", 422, "The caption cannot be kept";
    InstancePromptInRegularization = "instance_prompt_in_regularization", 422, "A regularization caption would name the subject";
    NothingToUndo = "nothing_to_undo", 409, "There is no such change to undo";
    InvalidOperations = "invalid_operations", 422, "The operations have a wrong value";
    SubsetExists = "subset_exists", 409, "The dataset has a subset of this name";
    UploadNotFound = "upload_not_found", 404, "There is no such upload";
    InvalidUpload = "invalid_upload", 422, "The upload's description has a wrong value";
    UploadNotOpen = "upload_not_open", 409, "The upload takes no parts";
    UploadIncomplete = "upload_incomplete", 409, "Parts of the upload are missing";
    TooManyUploads = "too_many_uploads", 409, "Too many uploads have parts";
    ChecksumMismatch = "checksum_mismatch", 422, "The content is not what it should be";
    LengthRequired = "length_required", 411, "The request has to tell the length of its body";
    ImageUnreadable = "image_unreadable", 409, "The image cannot be decoded";
    NothingUploaded = "nothing_uploaded", 422, "The upload holds no files";

    // captions by models
    CaptionerModelMissing = "captioner_model_missing", 409, "Files of the captioner's model are missing";
    CaptioningJobNotFound = "captioning_job_not_found", 404, "There is no such captioning job";

    // models
    ModelNotFound = "model_not_found", 404, "There is no such base model";
    VaeNotFound = "vae_not_found", 404, "There is no such VAE";
    InvalidModel = "invalid_model", 422, "The model cannot be used";
    ModelExists = "model_exists", 409, "Something in the model folder has this name";
    ModelInUse = "model_in_use", 409, "A run that has not ended needs the model";
    ModelNotUploaded = "model_not_uploaded", 409, "Only what was uploaded can be removed";

    // runs
    RunNotFound = "run_not_found", 404, "There is no such run";
    InvalidSettings = "invalid_settings", 422, "The settings have a wrong value";
    IllegalTransition = "illegal_transition", 409, "The run's state does not allow this";
    RunNotTraining = "run_not_training", 409, "The run does not train now";
    NoPrompts = "no_prompts", 409, "The run has no prompts";
    NotExtendable = "not_extendable", 409, "The run cannot be extended";
    GridNotFound = "grid_not_found", 404, "There is no such grid";
    GridNotReady = "grid_not_ready", 409, "The grid has no picture";
    NotReproducible = "not_reproducible", 409, "The run cannot be repeated";
    InputsChanged = "inputs_changed", 409, "The run's base model or plugins are not what they were";
    StillNeeded = "still_needed", 409, "Something still needs it";
    SampleNotFound = "sample_not_found", 404, "There is no such sample";
    OptimizerNotFound = "optimizer_not_found", 422, "No loaded plugin offers this optimizer";
    SchedulerNotFound = "scheduler_not_found", 422, "No loaded plugin offers this scheduler";
    LoraNotFound = "lora_not_found", 404, "There is no such LoRA";
    LoraUnusable = "lora_unusable", 422, "The LoRA file cannot be worked on";
    InvalidLoraRequest = "invalid_lora_request", 422, "The wish for a LoRA file has a wrong value";

    // webhooks
    WebhookNotFound = "webhook_not_found", 404, "There is no such webhook";
    InvalidWebhook = "invalid_webhook", 422, "The webhook's description has a wrong value";

    // the service itself
    TooManyRequests = "too_many_requests", 429, "More requests than allowed";
    Overloaded = "overloaded", 503, "Too many requests at the same time";
    InternalError = "internal_error", 500, "The service has failed";
    NotReady = "not_ready", 503, "The service is not ready";
    StorageFull = "storage_full", 507, "The data folder is full";
}

impl Code {
    /// The HTTP status that goes with the code.
    pub fn status(self) -> StatusCode {
        StatusCode::from_u16(self.status_number()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// The general code for a status that the web framework has answered by itself.
    pub fn for_status(status: StatusCode) -> Code {
        match status {
            StatusCode::UNAUTHORIZED => Code::Unauthorized,
            StatusCode::FORBIDDEN => Code::MissingScope,
            StatusCode::NOT_FOUND => Code::NotFound,
            StatusCode::METHOD_NOT_ALLOWED => Code::MethodNotAllowed,
            StatusCode::NOT_ACCEPTABLE => Code::NotAcceptable,
            StatusCode::REQUEST_TIMEOUT => Code::RequestTimeout,
            StatusCode::PRECONDITION_FAILED => Code::PreconditionFailed,
            StatusCode::LENGTH_REQUIRED => Code::LengthRequired,
            StatusCode::PAYLOAD_TOO_LARGE => Code::PayloadTooLarge,
            StatusCode::UNSUPPORTED_MEDIA_TYPE => Code::UnsupportedMediaType,
            StatusCode::RANGE_NOT_SATISFIABLE => Code::RangeNotSatisfiable,
            StatusCode::UNPROCESSABLE_ENTITY => Code::InvalidBody,
            StatusCode::TOO_MANY_REQUESTS => Code::TooManyRequests,
            StatusCode::SERVICE_UNAVAILABLE => Code::NotReady,
            status if status.is_client_error() => Code::BadRequest,
            _ => Code::InternalError,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn codes_are_distinct_words_with_real_statuses() {
        let words: HashSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(words.len(), Code::ALL.len());
        for code in Code::ALL {
            assert_eq!(
                code.status().as_u16(),
                code.status_number(),
                "{}",
                code.as_str()
            );
            assert!(
                code.as_str()
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || c == '_')
            );
        }
    }
}
