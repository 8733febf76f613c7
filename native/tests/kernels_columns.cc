#include "kernels.h"

namespace normjax {

NORMJAX_EACH_DTYPE(NORMJAX_COLUMNS, )

}  // namespace normjax
