#include "ops/mos.h"
