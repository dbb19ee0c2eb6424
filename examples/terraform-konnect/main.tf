# Meters a service of a Konnect control plane whose data planes run this plugin, on machines of your own.
#
#     kong-metering schema --format lua --plugin-name kong-metering > schema.lua
#     export TF_VAR_konnect_token=kpat_...
#     terraform init && terraform apply
#
# Konnect keeps the name `metering-and-billing` for the vendor's plugin, so this one has another one there. Data planes
# start the plugin server with `--plugin-name kong-metering`, and have that name in `plugins`.
terraform {
  required_providers {
    konnect = {
      source  = "kong/konnect"
      version = "~> 3.0"
    }
  }
}

variable "konnect_token" {
  description = "Personal or system account access token for Konnect."
  type        = string
  sensitive   = true
}

variable "server_url" {
  description = "Konnect's API in your region."
  type        = string
  default     = "https://us.api.konghq.com"
}

variable "ingest_endpoint" {
  description = "Where events are posted to."
  type        = string
  default     = "https://us.api.konghq.com/v3/openmeter/events"
}

variable "api_token" {
  description = "Token for it, or a vault reference that the data planes resolve."
  type        = string
  default     = "{vault://env/om-token}"
  sensitive   = true
}

variable "subject_header" {
  description = "Request header that names who is billed."
  type        = string
  default     = "x-tenant-id"
}

provider "konnect" {
  personal_access_token = var.konnect_token
  server_url            = var.server_url
}

resource "konnect_gateway_control_plane" "metered" {
  name         = "metered"
  cluster_type = "CLUSTER_TYPE_CONTROL_PLANE"
}

resource "konnect_gateway_custom_plugin_schema" "metering" {
  control_plane_id = konnect_gateway_control_plane.metered.id
  lua_schema       = file("${path.module}/schema.lua")
}

resource "konnect_gateway_service" "orders" {
  control_plane_id = konnect_gateway_control_plane.metered.id
  name             = "orders"
  protocol         = "http"
  host             = "orders.internal"
  port             = 80
}

resource "konnect_gateway_route" "orders" {
  control_plane_id = konnect_gateway_control_plane.metered.id
  name             = "orders"
  paths            = ["/orders"]
  service          = { id = konnect_gateway_service.orders.id }
}

# Without `service` it is global; `route` and `consumer` are the other scopes.
resource "konnect_gateway_custom_plugin" "metering" {
  control_plane_id = konnect_gateway_control_plane.metered.id
  name             = konnect_gateway_custom_plugin_schema.metering.name
  service          = { id = konnect_gateway_service.orders.id }
  config = {
    ingest_endpoint      = var.ingest_endpoint
    api_token            = var.api_token
    meter_api_requests   = true
    meter_ai_token_usage = false
    subject = {
      look_up_value_in = "header"
      field            = var.subject_header
    }
    queue = {
      max_batch_size = 100
    }
  }
}
