"""What the person sees who runs it: metrics, a status page, health; made of what each server tells."""
