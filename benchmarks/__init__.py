"""What bnguard costs, measured against the same thing without it."""
